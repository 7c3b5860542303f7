"""What stages write is as readable as the user's umask says, and no more."""

import contextlib
import os
import stat

import pytest

from tests.cases import tiny_params, write_corpus, write_params
from tests.stages.conftest import ALL


@pytest.fixture
def umask():
    """The group may read: files that are hidden from it show as well as files open to all."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_every_file_and_directory_follows_the_umask(decant, umask, tmp_path):
    params = tiny_params()
    del params["students"]["soft"]
    write_corpus(tmp_path / "corpus.txt")
    write_params(tmp_path, params)
    with contextlib.chdir(tmp_path):
        for arguments in (*ALL, ("report",)):
            result = decant(*arguments)
            assert result.exit_code == 0, result.output
    found = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "data").rglob("*")
    }
    wanted = {name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask for name in found}
    assert found == wanted
    assert len(found) > 100
