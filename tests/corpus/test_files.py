import gzip

import pytest

from pipeline.corpus.files import directory_written_whole, open_text, resolve_files
from pipeline.errors import ConfigError, ResourceError


def test_plain_and_gzip_read_alike_without_byte_order_mark(tmp_path):
    data = "\ufeffschön\r\nzwei".encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data, mtime=0))
    for name in ("a.txt", "a.txt.gz"):
        with open_text(tmp_path / name) as file:
            assert file.read() == "schön\r\nzwei"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine\xff", r"a\.txt: byte 4 .*0xff, expected UTF-8"),
        ("a.gz", b"no gzip at all", r"a\.gz: not a whole gzip file"),
        ("b.gz", gzip.compress(b"text" * 1000, mtime=0)[:-12], r"b\.gz: not a whole gzip file"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message), open_text(tmp_path / name) as file:
        file.read()


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match=f"{path.name}: cannot be read"), open_text(path):
            pass


def test_globs_are_sorted_relative_to_the_root_and_without_repeats(tmp_path):
    (tmp_path / "project").mkdir()
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    root = tmp_path / "project"
    found = resolve_files(("../*.txt", "../a.txt", str(tmp_path / "*.md")), root=root)
    assert [name for _, name, _ in found] == ["../a.txt", "../b.txt", "../c.md"]


def test_a_pattern_without_files_and_a_file_in_two_splits_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"'\*\.none' matches no file"):
        resolve_files("*.none", root=tmp_path)
    with pytest.raises(ConfigError, match=r"a\.txt stands in the splits train and test"):
        resolve_files({"train": "*.txt", "test": "a.txt"}, root=tmp_path)


def test_a_directory_is_replaced_whole_or_stays(tmp_path):
    output = tmp_path / "out"
    for content in ("first", "second"):
        with directory_written_whole(output) as temporary:
            (temporary / "file").write_text(content)
    third = directory_written_whole(output)
    (third.__enter__() / "file").write_text("third")
    assert third.__exit__(KeyError, KeyError(), None) is False
    assert (output / "file").read_text() == "second"
    assert list(tmp_path.iterdir()) == [output]


def test_no_space_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with (
        pytest.raises(ResourceError, match="free space or fix permissions"),
        directory_written_whole(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ("reviews [2024].tsv", ["reviews [2024].tsv"]),
        ("[v2]/a.tsv", ["[v2]/a.tsv"]),
        ("[v2]/*.tsv", ["[v2]/a.tsv", "[v2]/b?.tsv"]),
        ("[v2]/b?.tsv", ["[v2]/b?.tsv"]),
        ("revie*[[]2024].tsv", ["reviews [2024].tsv"]),
    ],
)
def test_what_exists_is_a_name_and_not_a_pattern(files, found, tmp_path):
    (tmp_path / "[v2]").mkdir()
    for name in ("reviews [2024].tsv", "reviews 2.tsv", "[v2]/a.tsv", "[v2]/b?.tsv"):
        (tmp_path / name).write_text("x")
    assert [name for _, name, _ in resolve_files(files, root=tmp_path)] == found
    absolute = resolve_files(f"{tmp_path}/{files}", root=tmp_path / "elsewhere")
    assert [path for _, _, path in absolute] == [tmp_path / name for name in found]
