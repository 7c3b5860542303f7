"""Every stage is a command, and its help shows how it is called."""

from importlib import import_module
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.cli import COMMANDS, STAGES, module_name

ROOT = Path(__file__).parents[2]
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_does_and_has_an_example(decant, name):
    result = decant(name, "--help")
    assert result.exit_code == 0
    assert f"decant {name}" in result.output.split("Example:")[1]
    summary = result.output.split("\n\n")[1].strip()
    assert summary.endswith("."), summary
    longest = max(map(len, result.output.splitlines()))
    assert longest <= 80


def test_every_summary_fits_in_the_list_of_commands(decant):
    listed = decant("--help").output.split("Commands:")[1].splitlines()
    lines = [line for line in listed if line.strip()]
    assert len(lines) == len(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)
    assert max(map(len, lines)) <= 80


def test_the_group_lists_the_stages_in_the_order_of_the_pipeline(decant):
    listed = [
        line.split()[0]
        for line in decant("--help").output.split("Commands:")[1].splitlines()
        if line.strip()
    ]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)
    assert list(PIPELINE) == [name for name in COMMANDS if name in PIPELINE] == ["code", *STAGES]


def test_every_dvc_stage_is_the_command_of_its_name():
    for name, stage in PIPELINE.items():
        assert stage.get("do", stage)["cmd"].split()[:2] == ["decant", name]
        assert import_module(module_name(name))


def test_an_unknown_command_is_one_line_and_no_traceback(decant):
    result = decant("captur", "main")
    assert result.exit_code == 2
    assert "No such command 'captur'" in result.stderr
