"""Data sets of the hub, as directories on disk: whole and streamed, by name and by split."""

import logging
import shutil

import datasets
import pytest

from pipeline.corpus.sources.hub import HubSource
from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.text.prepare import prepare_corpus
from pipeline.errors import ConfigError

NAMES = datasets.ClassLabel(names=["no", "yes"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def built(count, prefix="text", label=lambda i: i % 2):
    features = datasets.Features(
        {"text": datasets.Value("string"), "y": NAMES, "all": datasets.List(NAMES)}
    )
    rows = [{"text": f"{prefix} {i}", "y": label(i), "all": [i % 2]} for i in range(count)]
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture
def folder(tmp_path):
    """A data set of Parquet files, as it lies on the hub."""
    path = tmp_path / "set"
    path.mkdir()
    built(5).to_parquet(path / "train-0.parquet")
    built(3, "held", lambda _: -1).to_parquet(path / "test-0.parquet")
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_columns_and_class_names_are_found(tmp_path, folder, streaming):
    source = HubSource(id="set", label="y", streaming=streaming)
    reading = source.read(tmp_path)
    assert [(one.text, one.label, one.split) for one in reading.examples] == [
        *((f"text {i}", ["no", "yes"][i % 2], "train") for i in range(5)),
        # What published test splits without answers hold, -1, is no class.
        *((f"held {i}", "", "test") for i in range(3)),
    ]
    assert [one.source_row for one in reading.examples] == list(range(8))
    assert reading.examples[5].source == "test:1"


def test_streamed_or_not_the_same_is_read_and_provenance_is_of_content(tmp_path, folder):
    whole = HubSource(id="set", labels="all").read(tmp_path)
    streamed = HubSource(id="set", labels="all", streaming=True).read(tmp_path)
    assert whole == streamed
    assert whole.examples[1].labels == ("yes",)
    assert whole.provenance["id"] == "set"
    built(5, "other").to_parquet(folder / "train-0.parquet")
    assert HubSource(id="set", labels="all").read(tmp_path).provenance != whole.provenance


def test_a_streamed_limit_reads_the_first_rows_only(tmp_path, folder):
    found = HubSource(id="set", streaming=True, limit=2).read(tmp_path).examples
    assert [one.text for one in found] == ["text 0", "text 1", "held 0", "held 1"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote_is_read_too(tmp_path, streaming):
    datasets.DatasetDict(train=built(4), dev=built(2)).save_to_disk(tmp_path / "dict")
    built(4).save_to_disk(tmp_path / "one")
    splits = {"train": "train", "validation": "dev"}
    source = HubSource(id="dict", splits=splits, streaming=streaming)  # pyright: ignore
    assert [one.split for one in source.read(tmp_path).examples] == ["train"] * 4 + [
        "validation"
    ] * 2
    one = HubSource(id="one", streaming=streaming).read(tmp_path)
    assert len(one.examples) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "nobody/nothing"}, "corpus.source: nobody/nothing cannot be read"),
        ({"id": "nowhere"}, "corpus.source: nowhere cannot be read"),
        ({"config": "other"}, "corpus.source: set cannot be read"),
        ({"splits": {"train": "trian"}}, r"splits\.train: set has no split 'trian', it has"),
        ({"splits": {"test": "test"}}, r"splits\.train: set has no split 'train', it has"),
        ({"text": "sentence"}, r"set train:1: no column 'sentence', it has 'text', 'y', 'all'"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_set(tmp_path, folder, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        HubSource(**{"id": "set", **change}).read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_the_sets_error(tmp_path, folder):
    (folder / "train-0.parquet").write_bytes(b"PAR1 nothing PAR1")
    for streaming in (False, True):
        with pytest.raises(ConfigError, match=r"corpus\.source: set cannot be read"):
            HubSource(id="set", streaming=streaming).read(tmp_path)


def test_a_set_without_revision_is_warned_of_and_a_directory_is_not(tmp_path, folder, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError):
        HubSource(id="nobody/nothing").read(tmp_path)
    assert "nobody/nothing is not pinned" in caplog.text
    caplog.clear()
    HubSource(id="set").read(tmp_path)
    assert not caplog.records


@pytest.fixture
def cached(tmp_path):
    """A data set in the cache as after a first run online; return its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = tmp_path / "elsewhere" / "set"
    path.mkdir(parents=True)
    built(4).to_parquet(path / "train.parquet")
    builder = datasets.load_dataset_builder(str(path))
    builder.download_and_prepare()
    home = tmp_path / "cache" / "some___set" / "default" / "0.0.0" / commit
    home.parent.mkdir(parents=True)
    shutil.move(builder.cache_dir, home)
    shutil.rmtree(path)
    return commit


@pytest.mark.parametrize("streaming", [False, True])
def test_offline_a_set_comes_from_the_cache_with_its_commit(tmp_path, cached, streaming):
    reading = HubSource(id="some/set", label="y", streaming=streaming).read(tmp_path)
    assert [one.label for one in reading.examples] == ["no", "yes"] * 2
    assert reading.provenance["revision"] == cached
    pinned = HubSource(id="some/set", label="y", revision=cached).read(tmp_path)
    assert pinned.provenance == reading.provenance


def test_the_cache_of_another_commit_is_refused(tmp_path, cached):
    with pytest.raises(ConfigError, match=f"the cache has some/set at {cached}, expected f{{40}}"):
        HubSource(id="some/set", revision="f" * 40).read(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_keep_the_order_of_the_data_set(tmp_path, streaming):
    names = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    features = datasets.Features({"text": datasets.Value("string"), "y": names})
    rows = [{"text": f"text {i} of many", "y": i % 2} for i in range(12)]
    path = tmp_path / "mrpc"
    path.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(path / "train-0.parquet")
    source = HubSource(id="mrpc", label="y", streaming=streaming)
    assert source.read(tmp_path).classes == ("not_equivalent", "equivalent")
    assert HubSource(id="mrpc", streaming=streaming).read(tmp_path).classes == ()
    asked = {"source": source, "task": "classification", "seed": 0, "root": tmp_path}
    shares = {"validation_share": 0.2, "test_share": 0.2, "output": tmp_path / "out"}
    # As GLUE's F1 wants them: sorted, class 1 would be the other one.
    meta = prepare_corpus(**asked, **shares, classes=None)
    assert meta.classes == ("not_equivalent", "equivalent")
    own = ["equivalent", "not_equivalent"]
    assert prepare_corpus(**asked, **shares, classes=own).classes == tuple(own)


def test_words_for_nothing_are_text_as_in_a_table(tmp_path):
    (tmp_path / "set").mkdir()
    words = ["NA", "null", "None", "nan", "N/A"]
    lines = ["text,y", *(f"{word},a" for word in words), "last,"]
    (tmp_path / "set" / "train.csv").write_text("\n".join(lines) + "\n")
    hub = HubSource(id="set", label="y").read(tmp_path)
    table = TableSource(files="set/train.csv", label="y").read(tmp_path)
    for reading in (hub, table):
        assert [one.text for one in reading.examples] == [*words, "last"]
        assert [one.label for one in reading.examples] == [*("a" for _ in words), ""]
