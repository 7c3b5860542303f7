"""Signature to summary: which functions make an example."""

import ast

import pytest

from pipeline.corpus.sources.python_docs import (
    PythonDocsSource,
    documented_functions,
    function_examples,
    summary_of,
)

MODULE = '''
class Thing:
    def act(self, to: str = "x", *, n=1) -> int:
        """Do the thing now.

        More of it."""
        def inner():
            """Never seen from outside."""

if True:
    async def wait(*a, **k):
        """Wait for all of them."""

def bare(): pass
'''


def test_a_signature_has_its_class_and_its_annotations():
    assert list(documented_functions(ast.parse(MODULE))) == [
        ("def Thing.act(self, to: str='x', *, n=1) -> int", "Do the thing now."),
        ("async def wait(*a, **k)", "Wait for all of them."),
    ]


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("  Return all that is there.  \n\n  More.", "Return all that is there."),
        ("\nReturn all that is there.", "Return all that is there."),
        ("Return all that\nis there.", None),
        ("Too short.", None),
        ("long " * 31, None),
        ("f(x, y) -> number of things there", None),
        (">>> f(1) and so on", None),
        ("x = 1 sets it", None),
        ("1 2 3 4 words", None),
        ("", None),
    ],
)
def test_a_summary_is_one_line_of_prose(docstring, summary):
    assert summary_of(docstring) == summary


def test_copies_are_left_out_and_packages_are_groups():
    tree = ast.parse(MODULE)
    examples, dropped = function_examples([("pack.a", tree), ("pack.b", tree), ("c", tree)])
    assert [(one.source, one.group) for one in examples] == [("pack.a", "pack")] * 2
    assert dropped == {"duplicate_functions": 4}
    assert examples[0].references == ("Do the thing now.",)


@pytest.mark.slow
def test_this_interpreter_gives_some_thousand_of_them(tmp_path):
    reading = PythonDocsSource().read(tmp_path, "prompt-target")
    assert 2000 < len(reading.examples) < 10_000
    assert reading.unit == "example"
    assert all(one.text and one.target for one in reading.examples)
