"""The tables of the pages are those of the committed results."""

from pathlib import Path

import pytest

from benchmarks.results import RESULTS
from benchmarks.tables import REGION, TABLES, filled
from tests.docs.pages import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_figures_of_the_results(page):
    text = page.read_text()
    assert filled(text) == text, "run python -m benchmarks.tables"


def test_every_table_and_every_result_is_in_a_page():
    shown = {region[1] for page in PAGES for region in REGION.finditer(page.read_text())}
    assert shown == set(TABLES)
    assert {TABLES[name][0] for name in shown} == {path.stem for path in RESULTS.glob("*.json")}


def test_a_region_without_its_end_takes_no_text_with_it():
    text = (ROOT / "docs" / "training.md").read_text()
    cut = text.replace("<!-- end -->", "", 1)
    assert filled(cut) == cut


def test_another_result_is_another_table(tmp_path):
    page = ROOT / "docs" / "training.md"
    (tmp_path / "students.json").write_text(
        Path(RESULTS / "students.json").read_text().replace("142.6", "999.0")
    )
    assert "| CPU seconds | 999 |" in filled(page.read_text(), tmp_path)
