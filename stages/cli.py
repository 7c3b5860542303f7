"""`decant`: every stage of the pipeline as a command. A stage is imported when it is called."""

import importlib
from typing import Any

import click

COMMANDS = {
    "init": "init",
    "check": "check",
    "plan": "plan",
    "prepare": "prepare",
    "tokenize": "tokenize",
    "teach": "teach",
    "generate": "generate",
    "capture": "capture",
    "select": "select",
    "train": "train",
    "evaluate-teacher": "evaluate_teacher",
    "evaluate": "evaluate",
    "report": "report",
    "compare": "compare",
    "inspect": "inspect",
    "verify": "verify",
    "copy": "copy",
    "gc": "gc",
}
"""Commands in the order of the pipeline, and the module of `stages` each lives in."""


class _Stages(click.Group):
    """A group whose commands are found by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module: Any = importlib.import_module(f"stages.{COMMANDS[cmd_name]}")
        return getattr(module, COMMANDS[cmd_name])


@click.group(cls=_Stages, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="decant-kd")
def main() -> None:
    """Distil small models from a large one, offline: one store, many students.

    The commands are the stages of dvc.yaml; `dvc repro` runs them in order. Each reads params.yaml
    in the current directory and writes below data/.

    \b
    Example:
      decant capture main && decant select aligned && decant train aligned
    """


if __name__ == "__main__":
    main()
