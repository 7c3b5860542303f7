import json

import pytest
from click.testing import CliRunner

from benchmarks.students import main


@pytest.mark.slow
def test_four_students_read_the_store_once(tmp_path):
    result = CliRunner().invoke(
        main, ["--quick", "--results", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])["figures"]
    assert figures["one by one"]["segments_decoded"] == 4 * figures["together"]["segments_decoded"]
    assert figures["together"]["bytes_read"] < figures["one by one"]["bytes_read"] / 3
    assert (tmp_path / "students.json").exists()
