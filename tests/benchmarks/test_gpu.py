"""The steps of the GPU benchmark work, in small and on the CPU. Nothing is timed."""

import json
import math

from click.testing import CliRunner

from benchmarks.gpu import TERMS, main

STEPS = ("machine", "forms", "terms", "step", "capture 0.5 B", "head")


def test_steps_leave_a_line_each_and_are_not_run_again(tmp_path):
    options = [word for name in STEPS for word in ("--step", name)]
    for _ in range(2):
        result = CliRunner().invoke(main, ["--tiny", "--output", str(tmp_path), *options])
        assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(STEPS)
    figures = {line["step"]: line.get("figures", line) for line in lines}
    for form, errors in figures["forms"].items():
        assert all(0 <= error <= 1 for error in errors.values()), form
    assert figures["terms"].keys() == TERMS.keys()
    for name, by_dtype in figures["terms"].items():
        assert by_dtype["float32"] == {"loss": 0, "gradient": 0}, name
        assert all(map(math.isfinite, by_dtype["bfloat16"].values())), name
    assert "feature+attention+output+labels" in figures["step"]


def test_no_step_begins_that_would_end_too_late(tmp_path):
    result = CliRunner().invoke(main, ["--tiny", "--output", str(tmp_path), "--minutes", "0"])
    assert result.exit_code == 0
    assert not (tmp_path / "gpu.jsonl").exists()
