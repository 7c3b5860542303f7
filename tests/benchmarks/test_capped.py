import json

import pytest
from click.testing import CliRunner

from benchmarks.capped import OVER, main


@pytest.mark.slow
def test_both_ways_run_free_and_the_store_runs_under_the_cap(tmp_path):
    arguments = ["--quick", "--device", "cpu", "--results", str(tmp_path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])["figures"]
    assert "error" not in figures["capped"]["aligned"]
    assert figures["capped"]["aligned"]["capped_bytes"] <= figures["cap_bytes"]
    assert figures["cap_bytes"] == round(OVER * figures["free"]["aligned"]["capped_bytes"])
    assert set(figures["peak_over_labels"]) == {"plain", "labels", "soft", "aligned"}
    assert (tmp_path / "capped.json").exists()
