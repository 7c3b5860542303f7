"""The digests of a module change with every file that it runs, and with no other."""

import pytest

from pipeline.source_code import SourceCode
from tests.installed import install_package

FILES = {
    "ours/__init__.py": "",
    "ours/main.py": "import ours.plain\n\n\ndef late():\n    from ours import late_one\n",
    "ours/plain.py": "PAGE = 'page.html'\n",
    "ours/page.html": "<p>",
    "ours/unused.html": "",
    "ours/late_one.py": "import json\n",
    "ours/parts/__init__.py": "FIRST = 1\n",
    "ours/parts/one.py": "",
    "ours/registry.py": "PACKAGE, GROUP = 'ours.parts', 'decant.ours'\n",
    "ours/alone.py": "",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def names(module: str) -> list[str]:
    return [line.split("  ")[-1] for line in SourceCode(["ours"]).digests(module)]


def test_imports_of_functions_packages_and_files_by_name_are_followed(folder):
    assert names("ours.alone") == ["ours/__init__.py", "ours/alone.py"]
    assert names("ours.main") == [
        *("ours/__init__.py", "ours/late_one.py", "ours/main.py", "ours/page.html", "ours/plain.py")
    ]


def test_a_package_named_by_a_string_brings_all_its_modules(folder):
    assert names("ours.registry") == [
        *("ours/__init__.py", "ours/parts/__init__.py", "ours/parts/one.py", "ours/registry.py")
    ]


def test_parts_of_other_packages_count_where_their_group_is_named(folder, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    install_package(
        monkeypatch,
        site,
        name="their-part",
        code="import ours.alone\n",
        entries={"decant.ours": {"big": "their_part:Big"}},
    )
    assert names("ours.alone") == ["ours/__init__.py", "ours/alone.py"]
    *files, entry = names("ours.registry")
    assert entry == "their-part 1.0: decant.ours big = their_part:Big"
    assert {"their_part.py", "ours/alone.py"} <= set(files)


def test_an_edit_changes_the_line_of_its_file(folder):
    before = SourceCode(["ours"]).digests("ours.main")
    (folder / "ours/late_one.py").write_text("import json, math\n")
    after = SourceCode(["ours"]).digests("ours.main")
    assert [line.split("  ")[1] for line in after if line not in before] == ["ours/late_one.py"]
