"""`decant`: every stage of the pipeline as a command. A stage is imported when it is called."""

import importlib

import click

STAGES = (
    *("check", "prepare", "tokenize", "teach", "generate", "capture"),
    *("select", "train", "evaluate-teacher", "evaluate", "report"),
)
"""The stages of dvc.yaml in its order, without `code`, which lists the source files of each."""

COMMANDS = (
    *("init", "code", "check", "plan", *STAGES[1:]),
    *("compare", "inspect", "verify", "copy", "gc"),
)
"""All commands, in the order of the help."""


def module_name(command: str) -> str:
    """Return the module that defines a command, in a function of the module's own name."""
    return f"stages.{command.replace('-', '_')}"


class _Stages(click.Group):
    """A group whose commands are found by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = module_name(cmd_name)
        return getattr(importlib.import_module(name), name.removeprefix("stages."))


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
