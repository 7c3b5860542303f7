"""Which command writes a file of a project, for errors that say what to run."""

import re
from pathlib import Path

COMMANDS = {
    r"data/corpus/text(/|$)": "prepare",
    r"data/corpus/tokens/(?P<name>[^/]+)(/|$)": "tokenize",
    r"data/corpus/transfer/(?P<name>[^/]+)(/|$)": "generate",
    r"data/teachers/(?P<name>[^/]+)(/|$)": "teach",
    r"data/manifests/(?P<name>[^/]+)(/|$)": "capture",
    r"data/selected/(?P<name>[^/]+?)(\.agreement)?\.json$": "select",
    r"data/students/(?P<name>[^/]+)(/|$)": "train",
    r"data/metrics/curves/(?P<name>[^/]+)\.csv$": "train",
    r"data/(metrics|predictions)/students/(?P<name>[^/]+)\.jsonl?$": "evaluate",
    r"data/(metrics|predictions)/teachers/(?P<name>[^/]+)\.jsonl?$": "evaluate-teacher",
}
"""By where a project keeps what each command writes."""


def remedy(path: Path) -> str:
    """Return the advice to run the command that writes a file or directory of a project."""
    for place, command in COMMANDS.items():
        found = re.search(rf"(^|/){place}", path.as_posix())
        if found:
            name = found.groupdict().get("name")
            return f"run `decant {command}{f' {name}' if name else ''}`"
    return "run the stage that writes it again"
