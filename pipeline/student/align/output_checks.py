"""Checks of the output term against the form that logits are captured in.

They need declarations alone, so a contradiction is found before the teacher runs, and again before
the first step.
"""

from pipeline.errors import IncompatibleError
from pipeline.store.forms.form import Content
from pipeline.store.forms.registry import names_of
from pipeline.store.signals import Signal
from pipeline.student.align.objective import OutputTerm
from pipeline.student.losses.registry import OutputLoss, built_in, find_loss


def check_output_loss(signal: Signal, term: OutputTerm) -> None:
    """Refuse a loss that is undefined for what the form keeps.

    Raises:
        IncompatibleError: If the loss needs all logits, or others than were drawn.
    """
    content = signal.form.content
    if not find_loss(OutputLoss, term.loss).serves(content):
        served = [loss.name for loss in built_in(OutputLoss) if loss.serves(content)]
        raise IncompatibleError(
            f"loss.output.loss: {term.loss} cannot be computed from {signal.name}, which serves "
            f"{', '.join(served)} alone; use one of these, or capture logits as "
            f"{names_of(Content.LOGITS)}"
        )


def temperature_index(signal: Signal, temperature: float) -> int:
    """Return the index of a temperature among those captured; 0 for a form that serves any.

    Raises:
        IncompatibleError: If the form keeps some temperatures and not this one.
    """
    served = signal.form.temperatures_served
    if served is None:
        return 0
    if float(temperature) not in served:
        raise IncompatibleError(
            f"loss.output.temperature: {temperature}, but {signal.name} was captured at "
            f"{list(served)}; choose one of these, capture at this one too where the form can, or "
            f"use the form {names_of(Content.LOGITS)}"
        )
    return served.index(float(temperature))
