"""Write and read `docs/families.md`, the table of supported signals and losses by family."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.families.configs import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = """# Model families

What each text family of transformers supports as teacher and as student. `make families` writes
this page. It builds every family in miniature (random weights, one layer of each kind), runs
`decant check`, and then runs everything that the check accepts: capture, a training step with the
listed loss terms, export and loading. For a multimodal family it tests the language model.

* **teacher**: what can be captured in addition to attention: `hidden` states of all layers,
  `outputs` (logits).
* **attention**: the forms in which the attention of a layer can be captured.
* **student**: the loss terms that work for a student of the same family; **of another**: for a
  student of this family with a Llama or BERT teacher (without attention, because the numbers of
  heads would have to agree); **teacher-layers**: for a student initialised from the teacher's
  blocks.
* `–`: `decant check` refuses it with a one-line error. The last column shows the first such error,
  or why the family was not tested: its code requires other sizes, inputs other than text, or a
  package that is not installed.

A large model has other weights than its miniature, so capture compares the taps with the real model
before it writes anything.
"""
COLUMNS = ("teacher", "attention", "student", "of another", "teacher-layers")


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a family's cells, without its name and the reason."""
    teacher = [name for name in ("hidden", "outputs") if row[name]]
    attention = [name.split()[0] for name in row["attention"]]
    texts = [", ".join(teacher), ", ".join(attention)]
    texts += [row[key] for key in ("student", "foreign", "teacher_layers")]
    return ["–" if cell in ("", "no") else cell for cell in texts]


def write_page(rows: Iterable[Mapping[str, Any]], version: str, path: Path = PAGE) -> None:
    """Write the page from the results of a run over all families."""
    families = list(rows)
    lines = [HEAD, f"The last run: transformers {version}."]
    for task in TASKS:
        own = [row for row in families if row["task"] == task]
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
    tables: dict[str, dict[str, list[str]]] = {}
    task = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            task = line.removeprefix("## ")
            tables[task] = {}
        elif task and line.startswith("| ") and not line.startswith("| family"):
            family, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
            tables[task][family] = rest[: len(COLUMNS)]
    return tables
