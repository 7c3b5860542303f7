"""Sources of another package are read like ours, and leave their package in the provenance."""

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline.corpus.sources import registry
from pipeline.corpus.sources.registry import CorpusSource, provenance
from pipeline.errors import ConfigError
from pipeline.registry import Registry
from tests.installed import install_package

SOURCE = """
from typing import Literal

from pipeline.corpus.sources.base import Reading, SourceConfig
from pipeline.corpus.text.examples import Example


class Letters(SourceConfig):
    kind: Literal["letters"] = "letters"
    words: tuple[str, ...]

    def read(self, root, task="causal-lm"):
        examples = [
            Example(text=word, source="letters", source_row=row)
            for row, word in enumerate(self.words)
        ]
        return Reading(examples, {"kind": self.kind}, {})
"""
SECTION = {"kind": "letters", "words": ["abc", "def"]}


@pytest.fixture
def letters(monkeypatch, tmp_path):
    (tmp_path / "site").mkdir()
    install_package(
        monkeypatch,
        tmp_path / "site",
        name="letters-source",
        code=SOURCE,
        entries={"decant.sources": {"letters": "letters_source:Letters"}},
    )
    fresh = Registry(
        "corpus source",
        package="pipeline.corpus.sources",
        group="decant.sources",
        name_of=registry._kind,
    )
    monkeypatch.setattr(registry, "SOURCES", fresh)


@pytest.mark.usefixtures("letters")
def test_a_source_of_another_package_is_validated_and_read(tmp_path):
    source = TypeAdapter(CorpusSource).validate_python(SECTION)
    reading = source.read(tmp_path)
    assert [example.text for example in reading.examples] == ["abc", "def"]
    assert provenance(source, reading) == {
        "kind": "letters",
        "given_by": {"package": "letters-source", "version": "1.0"},
    }


@pytest.mark.usefixtures("letters")
def test_a_wrong_key_of_its_section_is_found_where_it_is():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(CorpusSource).validate_python({**SECTION, "words": ["a", 1]})
    assert [error["loc"] for error in caught.value.errors()] == [("words", 1)]


def test_a_source_of_ours_has_plain_provenance(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    source = TypeAdapter(CorpusSource).validate_python({"kind": "text", "files": "a.txt"})
    reading = source.read(tmp_path)
    assert provenance(source, reading) == reading.provenance


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValidationError, match="'hub', 'parallel', 'python-docs', 'table', 'text'"):
        TypeAdapter(CorpusSource).validate_python(SECTION)


def test_a_source_of_a_missing_package_is_unknown():
    with pytest.raises(ConfigError, match="corpus source 'letters' is unknown; expected one"):
        registry.SOURCES["letters"]
