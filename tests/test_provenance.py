"""Identity and durability: equal things have equal fingerprints, files are whole or absent."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, IntegrityError, ResourceError
from pipeline.provenance import (
    file_sha256,
    fingerprint,
    make_directory,
    read_json,
    software,
    write_bytes_atomically,
    write_json,
)


def test_a_fingerprint_does_not_depend_on_key_order_or_on_the_process():
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    again = {"a": {"ü": True}, "b": [1, 2.5, None]}
    assert fingerprint(value) == fingerprint(again)
    # Salted `hash()` would differ from process to process.
    code = f"from pipeline.provenance import fingerprint; print(fingerprint({value!r}))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert other.stdout.strip() == fingerprint(value)


@pytest.mark.parametrize(
    ("one", "other"), [({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ([1, 2], [2, 1]), (1, "1")]
)
def test_different_values_have_different_fingerprints(one, other):
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_has_no_fingerprint(value, tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint({"a": value})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


def test_json_is_deterministic_and_comes_back(tmp_path):
    value = {"b": 1e-4, "a": ["ü", None]}
    write_json(tmp_path / "deep" / "er" / "a.json", value)
    write_json(tmp_path / "b.json", dict(reversed(value.items())))
    assert read_json(tmp_path / "b.json") == value
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "deep/er/a.json").read_bytes()


@pytest.mark.parametrize("cut", ["write", "replace"])
@pytest.mark.parametrize("aside", [False, True])
def test_a_write_that_is_cut_short_leaves_what_was_there(tmp_path, monkeypatch, cut, aside):
    path, staging = tmp_path / "a", tmp_path / "staging"
    write_bytes_atomically(path, b"before")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "fsync") if cut == "write" else (Path, "replace")), killed)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomically(path, b"after", aside=staging if aside else None)
    assert path.read_bytes() == b"before"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_content_and_names_are_synced_in_order(tmp_path, monkeypatch):
    """File, rename, its directory; new directories too. Else a receipt outlives its shards."""
    events = []
    replace = Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: events.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, to: events.append("rename") or replace(self, to)
    )
    write_bytes_atomically(tmp_path / "new" / "c" / "a", b"1")
    # `tmp_path` is empty: whoever made it may have been killed before it was durable.
    above = [tmp_path.parent, tmp_path, tmp_path / "new"]
    assert events[:3] == [str(path) for path in above]
    assert Path(events[3]).parent == tmp_path / "new" / "c"
    assert events[4:] == ["rename", str(tmp_path / "new" / "c")]


def test_no_space_is_a_resource_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        found = r"a: cannot be written \(.*: needs 5,000 bytes, [0-9,]+ free\); free space"
        with pytest.raises(ResourceError, match=found) as raised:
            write_bytes_atomically(tmp_path / "a", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_how_much_is_needed_and_free(tmp_path, monkeypatch, code):
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"needs 1,234,567 bytes, [0-9,]+ free") as raised:
        write_bytes_atomically(tmp_path / "a" / "b", bytes(1_234_567), aside=tmp_path / "staging")
    assert "\n" not in str(raised.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_empty_directory_is_made_durable_and_a_filled_one_is(tmp_path, monkeypatch):
    """Who finds one empty cannot know whether its maker lived to sync it."""
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink())
    )
    (tmp_path / "a").mkdir()
    make_directory(tmp_path / "a")
    assert synced == [tmp_path]
    (tmp_path / "a" / "b").touch()
    make_directory(tmp_path / "a")
    assert synced == [tmp_path]


def test_a_directory_that_cannot_be_made_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_bytes_atomically(tmp_path / "file" / "a", b"")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_an_integrity_error(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(IntegrityError, match="not readable as JSON"):
        read_json(tmp_path / "a.json")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(IntegrityError, match=r"a\.json: missing"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="a: cannot be read"):
        file_sha256(tmp_path / "a")


def test_software_names_versions_of_what_computes():
    assert {"python", "machine", "torch", "numpy", "numcodecs"} <= software().keys()
