"""English prose that every Python carries: the docstrings of its own standard library.

About 2 MB that need no download. One example is one module's or language topic's documentation;
for prompt-target, one function's signature and summary.
The text differs between Python versions, so the version is part of what was read.
"""

import ast
import hashlib
import inspect
import logging
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

from pipeline.corpus.sources.base import Reading, SourceConfig, Unit
from pipeline.corpus.text.duplicates import RUN_WORDS, normalised, paragraphs, runs
from pipeline.corpus.text.examples import Example
from pipeline.errors import ConfigError
from pipeline.tasks import Task

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


logger = logging.getLogger(__name__)

# Code tables, tests and what is installed beside the standard library: no prose of it.
SKIPPED_DIRECTORIES = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)

# A docstring with more of its word runs in earlier ones than this is a copy with small changes,
# such as distutils' commands or the pure-Python twins of C modules.
MAX_CONTAINMENT = 0.5

# A whole interpreter gives about 2 MB. Less than this means stripped sources, not a small Python.
MIN_BYTES = 200_000
# The same for signatures and summaries, which are about a tenth of it.
MIN_FUNCTION_BYTES = 50_000


class PythonDocsSource(SourceConfig):
    """Section `corpus.source` of kind `python-docs`."""

    tasks: ClassVar[tuple[Task, ...]] = ("causal-lm", "prompt-target")

    kind: Literal["python-docs"] = "python-docs"

    def read(self, root: Path, task: Task = "causal-lm") -> Reading:
        """Read the running interpreter's standard library, and its language topics for causal-lm.

        Raises:
            ConfigError: If the interpreter has no library sources or its docstrings were stripped.
        """
        library = Path(sysconfig.get_path("stdlib"))
        unit: Unit = "paragraph"
        smallest = MIN_BYTES
        if task == "prompt-target":
            smallest, unit = MIN_FUNCTION_BYTES, "example"
            examples, dropped = function_examples(parsed_modules(library))
        else:
            documents = [*module_documents(library), *topic_documents()]
            examples, dropped = build_examples(documents)
        size_bytes = sum(example.text_bytes for example in examples)
        if size_bytes < smallest:
            raise ConfigError(
                f"{library}: the standard library's sources give {size_bytes} bytes of docstrings, "
                f"expected at least {smallest}; this Python has no .py files or stripped ones, "
                "use another Python or another corpus.source"
            )
        digest = hashlib.sha256()
        for example in examples:
            text = "\0".join(example.texts)
            digest.update(f"{example.source}\0{text}\0".encode())
        provenance = {
            "kind": self.kind,
            "python": platform.python_version(),
            "digest": digest.hexdigest(),
        }
        logger.info(
            "read %d examples of Python %s, %d bytes",
            len(examples),
            provenance["python"],
            size_bytes,
        )
        return Reading(examples, provenance, dropped, unit=unit)


def parsed_modules(library: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield each module's name and syntax tree, in the order of names.

    Files that do not parse with this Python are left out, as its own import would leave them.
    """
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        # config-3.11-x86_64-linux-gnu holds build scripts and varies with the machine.
        if SKIPPED_DIRECTORIES & set(parts) or not all(part.isidentifier() for part in parts):
            continue
        # Written at build time: names of compilers and paths of the machine.
        if parts[-1].startswith("_sysconfigdata"):
            continue
        try:
            # Old-fashioned escapes in others' code are no concern of the user's.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            logger.debug("%s does not parse and is left out", path)
            continue
        yield ".".join(part for part in parts if part != "__init__") or parts[0], tree


def module_documents(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each module's name and its docstrings, in the order of names and of the source.

    A docstring other than the module's own stands below the name of what it documents.
    """
    for name, tree in parsed_modules(library):
        found = list(_docstrings(tree, name))
        if found:
            yield name, found


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = _prose(ast.get_docstring(node, clean=False) or "")
        if text:
            yield text if isinstance(node, ast.Module) else f"{name}\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from _docstrings(child, name)


def _prose(docstring: str) -> str:
    """Clean a docstring's margin and leave out its interpreter sessions, which are no prose."""
    lines = [line.rstrip() for line in inspect.cleandoc(docstring).splitlines()]
    kept = (part for part in paragraphs("\n".join(lines)) if not part.lstrip().startswith(">>>"))
    return "\n\n".join(part.strip("\n") for part in kept)


def topic_documents() -> Iterator[tuple[str, list[str]]]:
    """Yield the language topics of `help()`, where this Python has them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        prose = _prose(text)
        if prose:
            yield f"help:{name}", [prose]


def build_examples(
    documents: list[tuple[str, list[str]]],
) -> tuple[list[Example], dict[str, int]]:
    """Make one example of each document, leaving out paragraphs that were seen before.

    Modules of one top-level package form a group, so that no split parts them: they
    document each other.

    Returns:
        The examples, and the number of paragraphs left out.
    """
    seen_texts: set[str] = set()
    seen_runs: set[int] = set()
    examples: list[Example] = []
    duplicates = 0
    for name, docstrings in documents:
        kept: list[str] = []
        for docstring in docstrings:
            for paragraph in paragraphs(docstring):
                words = normalised(paragraph)
                own = runs(paragraph)
                is_long = words.count(" ") + 1 >= RUN_WORDS
                is_copy = is_long and (
                    words in seen_texts or len(own & seen_runs) > MAX_CONTAINMENT * len(own)
                )
                if is_copy:
                    duplicates += 1
                    continue
                seen_texts.add(words)
                seen_runs |= own
                kept.append(paragraph)
        if kept:
            group = name if name.startswith("help:") else name.split(".")[0]
            examples.append(
                Example(text="\n\n".join(kept), source=name, source_row=len(examples), group=group)
            )
    return examples, {"duplicate_paragraphs": duplicates}
