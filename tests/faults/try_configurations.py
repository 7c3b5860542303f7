"""Runs commands in directories, each in a fork, where torch must not be imported.

`python -m tests.faults.try_configurations CASES`: a JSON list of directory and arguments comes in,
one of exit code, stderr and whether torch was imported goes out.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from stages.cli import COMMANDS, main, module_name

HEAVY = ("torch", "transformers.models")


def run(directory: str, arguments: list[str]) -> dict[str, Any]:
    """Run one command in a process of its own."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(directory)
            code = 1
            try:
                main(arguments, prog_name="decant")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            sys.stdout.flush()
            sys.stderr.flush()
            is_heavy = any(name in sys.modules for name in HEAVY)
            os.write(2, f"\nheavy: {is_heavy}\n".encode())
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return {"code": code, "output": output.read()}


if __name__ == "__main__":
    for command in COMMANDS:
        importlib.import_module(module_name(command))
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.stdout.write(json.dumps([run(*case) for case in cases]))
