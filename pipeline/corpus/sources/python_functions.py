"""Signature to summary line: what a function of the standard library does, said from its head.

The prompt-target task that needs no download: short prompts, one right answer, and prose.
"""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator

from pipeline.corpus.text.duplicates import normalised
from pipeline.corpus.text.examples import Example

Function = ast.FunctionDef | ast.AsyncFunctionDef

MIN_WORDS, MAX_WORDS = 3, 30
# Signatures repeated as a summary, field lists and code are no sentences.
_NO_PROSE = re.compile(r"->|>>>|[=<>{}|\\`\[\]_*#@]|\w\(|\.\w|^\W")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


def function_examples(
    modules: Iterable[tuple[str, ast.Module]],
) -> tuple[list[Example], dict[str, int]]:
    """Make one example of each documented function, leaving out what was seen before.

    Functions of one top-level package form a group, as modules do: they document each other.

    Returns:
        The examples, and the number of functions left out as copies.
    """
    seen: set[tuple[str, str]] = set()
    examples: list[Example] = []
    copies = 0
    for module, tree in modules:
        for signature, summary in documented_functions(tree):
            key = (normalised(signature), normalised(summary))
            if key in seen:
                copies += 1
                continue
            seen.add(key)
            examples.append(
                Example(
                    text=signature,
                    target=summary,
                    references=(summary,),
                    source=module,
                    source_row=len(examples),
                    group=module.split(".")[0],
                )
            )
    return examples, {"duplicate_functions": copies}


def documented_functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield signature and summary of every function below a node whose summary is prose."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from documented_functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, Function):
            summary = summary_of(ast.get_docstring(child, clean=False) or "")
            if summary is not None:
                yield _signature(child, prefix), summary
        elif isinstance(child, (ast.If, ast.Try)):
            yield from documented_functions(child, prefix)


def _signature(node: Function, prefix: str) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {prefix}{node.name}({ast.unparse(node.args)}){returns}"


def summary_of(docstring: str) -> str | None:
    """Return a docstring's summary line (PEP 257), None where it is not one line of prose."""
    lines = inspect.cleandoc(docstring).split("\n")
    first = lines[0].strip()
    goes_on = len(lines) > 1 and lines[1].strip()
    words = first.split()
    # A line that goes on would be half a sentence.
    if goes_on or not MIN_WORDS <= len(words) <= MAX_WORDS or _NO_PROSE.search(first):
        return None
    plain = sum(bool(_WORD.fullmatch(word.strip("().,;:!?\"'"))) for word in words)
    return first if plain >= 0.8 * len(words) else None
