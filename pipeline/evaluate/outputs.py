"""What a sequence model says to each row of a split: its logits, in the order of the rows."""

import datasets
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.evaluate.batches import batches


def sequence_logits(
    model: PreTrainedModel,
    split: datasets.Dataset,
    *,
    outputs: int,
    pad_id: int,
    batch_tokens: int,
    device: torch.device,
    label: str = "outputs",
) -> Float[Tensor, "rows outputs"]:
    """Run a sequence model over a split.

    Args:
        model: A sequence model on `device`, in evaluation mode.
        split: Rows with `input_ids`, and `token_type_ids` where the tokenizer makes them.
        outputs: How many numbers the task asks for.
        pad_id: Id written into padding.
        batch_tokens: Largest rows times longest row of a batch.
        device: Where the model is.
        label: What the progress bar says.

    Returns:
        The logits in float64, on the CPU.

    Raises:
        IncompatibleError: If the model has another number of outputs, or another padding id:
            decoders read theirs off the last token that is not padding, by that id.
        ConfigError: If the split is empty.
        IntegrityError: If a logit is not finite.
    """
    own_pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if own_pad != pad_id:
        raise IncompatibleError(
            f"{label}: the model pads with id {own_pad}, the tokens with {pad_id}, expected the "
            f"same; set pad_token_id to {pad_id} in the model's config.json"
        )
    found = torch.zeros((len(split), outputs), dtype=torch.float64)
    with torch.inference_mode():
        for batch in batches(
            split,
            model=model,
            pad_id=pad_id,
            batch_tokens=batch_tokens,
            device=device,
            label=label,
        ):
            logits = model(**batch.inputs()).logits
            if logits.shape[-1] != outputs:
                raise IncompatibleError(
                    f"{label}: the model has {logits.shape[-1]} outputs, the corpus {outputs}, "
                    "expected the same; train the model on this corpus"
                )
            if not torch.isfinite(logits).all():
                raise IntegrityError(
                    f"{label}: a logit of rows {batch.rows[0]}... is not finite, expected finite "
                    "ones; the model's weights are damaged or its training diverged"
                )
            found[list(batch.rows)] = logits.cpu().double()
    return found
