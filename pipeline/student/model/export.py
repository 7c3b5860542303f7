"""What a finished training leaves: a plain Hugging Face directory, and the curve of its loss."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pipeline.provenance import (
    needing_room,
    replace_directory,
    write_bytes_atomically,
    write_json,
)
from pipeline.store.reader import StoreReader
from pipeline.student.align.objective import TERMS
from pipeline.student.vocabulary.vocabulary import Vocabulary
from pipeline.taps.tap import IMPLEMENTATION
from pipeline.training.both_versions import write_for_both


def export(
    student: PreTrainedModel,
    reader: StoreReader,
    output: Path,
    record: Mapping[str, Any],
    kept: Vocabulary | None = None,
) -> None:
    """Write the student, with the tokenizer, where any Hugging Face loader finds it.

    transformers 4.57 and 5 read the same model from it.

    It is written and synced aside, with `record` of where it comes from, and takes the place of an
    earlier one by two renames: a student is whole or it is not there.

    Raises:
        ResourceError: If there is no room for it.
    """
    staging = output.with_name(f".{output.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    if student.config._attn_implementation == IMPLEMENTATION:
        student.set_attn_implementation("sdpa" if student._supports_sdpa else "eager")
    with needing_room(staging, sum(p.numel() * p.element_size() for p in student.parameters())):
        student.save_pretrained(staging)
        if kept is None:
            reader.copy_tokenizer(staging)
        else:
            kept.tokenizer.save(staging)
        write_for_both(staging)
    write_json(staging / "distillation.json", record)
    replace_directory(output, staging)


def write_curve(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write the logged values, a row a logged step, columns in a fixed order."""
    rows = [row for row in history if "loss" in row]
    more = sorted({key for row in rows for key in row if key.startswith(("gradient_", "factor_"))})
    wanted = ["step", "epoch", "loss", *TERMS, *more, "grad_norm", "learning_rate"]
    columns = [key for key in wanted if any(key in row for row in rows)]
    lines = [",".join(columns)]
    lines += [",".join(f"{row[key]:.6g}" if key in row else "" for key in columns) for row in rows]
    write_bytes_atomically(path, ("\n".join(lines) + "\n").encode())
