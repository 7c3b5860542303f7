"""The results of a training: a plain Hugging Face directory, and the curve of the loss."""

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
    """Write the student and its tokenizer as a Hugging Face directory.

    transformers 4.57 and 5 read the same model from it. The directory is written and synced under
    another name and replaces an earlier one by two renames, so a student is complete or absent.

    Args:
        student: The student.
        reader: The store, which holds the teacher's tokenizer.
        output: The directory.
        record: How the student was made; written as `distillation.json`.
        kept: The student's own vocabulary, if it is smaller than the teacher's.

    Raises:
        ResourceError: If the disk is full.
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
    """Write the logged values as CSV, one row for each logged step, columns in a fixed order."""
    rows = [row for row in history if "loss" in row]
    extra = sorted({key for row in rows for key in row if key.startswith(("gradient_", "factor_"))})
    wanted = ["step", "epoch", "loss", *TERMS, *extra, "grad_norm", "learning_rate"]
    columns = [key for key in wanted if any(key in row for row in rows)]
    lines = [",".join(columns)]
    lines += [",".join(f"{row[key]:.6g}" if key in row else "" for key in columns) for row in rows]
    write_bytes_atomically(path, ("\n".join(lines) + "\n").encode())
