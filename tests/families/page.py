"""`docs/families.md`: the table of what each family can be asked for, and reading it back."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.families.configs import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = """# Model families

What each text family of transformers can be asked for, as teacher and as student. `make families`
writes this page: it builds every family in miniature (random weights, a layer of each kind), asks
`decant check`, and does what the check says yes to: capture, a step of training with the terms
named, export, loading. Of a family that reads images too it tries the language model.

* **teacher**: what can be captured besides attention: `hidden` states of all layers, `outputs`
  (logits).
* **attention**: the forms in which the attention of a layer can be captured.
* **student**: the terms with which a student of the same family learns; **of another**: a student
  of this family with a Llama or BERT teacher (without attention: the heads would have to agree);
  **teacher-layers**: a student that starts from the teacher's own blocks.
* `–`: `decant check` refuses it in one line. The last column has the first such line, or says why
  the family was not tried: its code wants other sizes, other inputs than text, or a package that
  is not installed.

A large model differs from its miniature in its weights: before it writes anything, capture
compares the taps with the model itself.
"""
COLUMNS = ("teacher", "attention", "student", "of another", "teacher-layers")


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a family's cells, without its name and the reason."""
    teacher = [name for name in ("hidden", "outputs") if row[name]]
    attention = [name.split()[0] for name in row["attention"]]
    found = [", ".join(teacher), ", ".join(attention)]
    found += [row[key] for key in ("student", "foreign", "teacher_layers")]
    return ["–" if cell in ("", "no") else cell for cell in found]


def write_page(rows: Iterable[Mapping[str, Any]], version: str, path: Path = PAGE) -> None:
    """Write the page of a run over all families."""
    rows = list(rows)
    lines = [HEAD, f"The last run: transformers {version}."]
    for task in TASKS:
        own = [row for row in rows if row["task"] == task]
        works = sum(row["outputs"] and row["student"] != "no" for row in own)
        lines += ["", f"## {task}", ""]
        lines += [f"{works} of {len(own)} families are both teacher and student.", ""]
        lines += [f"| family | {' | '.join(COLUMNS)} | refused because |"]
        lines += ["|---" * (len(COLUMNS) + 2) + "|"]
        for row in own:
            reason = row["reason"].split(";")[0].replace("|", "\\|")
            lines.append(f"| {row['family']} | {' | '.join(cells(row))} | {reason} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_page(path: Path = PAGE) -> dict[str, dict[str, list[str]]]:
    """Return the page's cells by task and family."""
    found: dict[str, dict[str, list[str]]] = {}
    task = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            task = line.removeprefix("## ")
            found[task] = {}
        elif task and line.startswith("| ") and not line.startswith("| family"):
            family, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
            found[task][family] = rest[: len(COLUMNS)]
    return found
