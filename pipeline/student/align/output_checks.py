"""What the output term asks of the form that logits are captured in, told by declarations alone.

So a contradiction is found before the teacher runs, and again before the first step.
"""

from pipeline.errors import IncompatibleError
from pipeline.store.records import Declaration
from pipeline.student.align.objective import OutputTerm
from pipeline.student.losses.registry import OUTPUT, find_loss


def check_output_loss(declared: Declaration, term: OutputTerm) -> None:
    """Refuse a loss that is undefined for what the form keeps.

    Raises:
        ConfigError: If there is no such loss.
        IncompatibleError: If the loss needs all logits, or others than were drawn.
    """
    loss = find_loss(OUTPUT, term.loss, key="loss.output.loss")
    if declared.form == "topk" and loss.topk is None:
        raise IncompatibleError(
            f"loss.output.loss: {term.loss} needs all of the teacher's logits, {declared.signal} "
            "has some; capture logits as head"
        )
    if declared.form == "sampled" and loss.sampled is None:
        raise IncompatibleError(
            f"loss.output.loss: {term.loss} cannot be estimated from {declared.signal}, which "
            "serves forward_kl alone; use that, or capture logits as head"
        )


def temperature_index(declared: Declaration, temperature: float) -> int:
    """Return the place of a temperature among those captured; 0 for a form that serves any.

    Raises:
        IncompatibleError: If the form keeps some temperatures and not this one.
    """
    if declared.form == "sampled" and temperature != 1.0:
        raise IncompatibleError(
            f"loss.output.temperature: {temperature}, but {declared.signal} holds samples drawn at "
            "temperature 1; set it to 1, or use the form head"
        )
    if declared.form != "topk":
        return 0
    captured = [float(t) for t in declared.options["temperatures"]]
    if float(temperature) not in captured:
        raise IncompatibleError(
            f"loss.output.temperature: {temperature}, but {declared.signal} was captured at "
            f"{captured}; choose one of these, capture at this one too, or use the form head"
        )
    return captured.index(float(temperature))
