"""Collects the signals that a project's revisions name: branches, tags, stashes and worktrees.

Capture writes `data/manifests/<teacher>/<signal>.json`, which a project keeps in git, so git knows
what each revision needs of each store. The git program is used, only reads objects, and may not
fetch.
"""

import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import IntegrityError, ResourceError

MANIFESTS = Path("data", "manifests")
MANIFEST = re.compile(rb"(?:^|(?P<project>.*)/)data/manifests/[^/]+/[^/]+\.json")
PIPELINE = re.compile(rb"(?:(?P<project>.*)/)?dvc\.yaml")
CAPTURES = b"data/manifests"
"""Text in every `dvc.yaml` that has a capture stage."""
RUNNING = ".dvc/tmp/exps/**"
"""The checkouts in which DVC runs queued experiments."""


@dataclass
class Named:
    """The signals that revisions name.

    Attributes:
        signals: The signals, and `blocks`, by the name of their store.
        revisions: The number of revisions read, where those with the same files count once.
        silent: Revisions with a capture stage but without manifests in git, whose needs are
            unknown.
        in_git: Whether the project is in git; if not, only its workspace was read.
    """

    signals: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    revisions: int = 0
    silent: list[str] = field(default_factory=list)
    in_git: bool = False

    def add(self, manifest: bytes, place: str) -> None:
        """Add the signal of one manifest.

        Raises:
            IntegrityError: If it cannot be read, as its signal would look unneeded.
        """
        try:
            record = json.loads(manifest)
            store, signal = record["store"], record.get("signal")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IntegrityError(
                f"{place}: names no store; run the capture stage of this teacher first (`decant "
                "capture TEACHER`), or remove the revision"
            ) from error
        signals = self.signals[str(store)]
        if signal is not None:
            signals.add(str(signal))


def named_signals(workspaces: Sequence[Path]) -> Named:
    """Collect the signals that every revision and every workspace names.

    Args:
        workspaces: Directories of the project: the current one, and the one that experiments share.

    Raises:
        IntegrityError: If a manifest or a revision cannot be read.
        ResourceError: If the project is in git but git cannot be run.
    """
    named = Named()
    for workspace in dict.fromkeys(path.resolve() for path in workspaces):
        _read_files(named, workspace, (MANIFESTS, Path(RUNNING) / MANIFESTS))
    here = workspaces[0].resolve()
    if not any((folder / ".git").exists() for folder in (here, *here.parents)):
        return named
    named.in_git = True
    _Git(here).ask(named)
    return named


def _read_files(named: Named, workspace: Path, folders: Iterable[Path]) -> bool:
    """Add a working tree's manifests; tell whether there are any."""
    found = [path for folder in folders for path in sorted(workspace.glob(f"{folder}/*/*.json"))]
    for path in found:
        named.add(path.read_bytes(), str(path))
    return bool(found)


class _Git:
    """Questions to the git repository that a project is in."""

    def __init__(self, project: Path) -> None:
        program = shutil.which("git")
        if program is None:
            raise ResourceError(
                f"{project}: in git, but git is not on PATH, so branches cannot be asked what they "
                "need; install git"
            )
        self._program = program
        self._project = project

    def _run(self, *arguments: str, given: bytes = b"", check: bool = True) -> bytes:
        offline = {
            "GIT_ALLOW_PROTOCOL": "none",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_TERMINAL_PROMPT": "0",
        }
        done = subprocess.run(
            [self._program, *arguments],
            cwd=self._project,
            env={**os.environ, **offline, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            input=given,
            capture_output=True,
            check=False,
        )
        if check and done.returncode:
            raise ResourceError(
                f"{self._project}: git {arguments[0]} failed "
                f"({done.stderr.decode(errors='replace').strip()}); correct that first: without it "
                "the needs of branches are unknown"
            )
        return done.stdout

    def ask(self, named: Named) -> None:
        """Add what all revisions, indexes and worktrees name."""
        revisions = self._revisions()
        spoken_for = set()
        prefix = os.fsdecode(self._run("rev-parse", "--show-prefix")).strip("\n")
        for worktree, head in self._worktrees():
            has_manifests = _read_files(named, worktree / prefix, (MANIFESTS,))
            if head is not None:
                revisions.append((head, f"HEAD of {worktree}"))
                if has_manifests:
                    spoken_for.add(head)
            staged = self._run(
                "-C", str(worktree), "ls-files", "--stage", "-z", "--full-name", ":/"
            )
            self._read_blobs(named, _manifests(staged), f"the index of {worktree}")
        trees = self._trees([object_id for object_id, _ in revisions])
        # A revision that is checked out next to manifests has been read, whatever is in git.
        answered = {trees[head] for head in spoken_for if head in trees}
        names: dict[str, list[str]] = defaultdict(list)
        for object_id, name in revisions:
            if object_id in trees:
                names[trees[object_id]].append(name)
        for tree, called in names.items():
            listing = self._run("ls-tree", "-r", "-z", "--full-tree", tree)
            self._read_blobs(named, _manifests(listing), called[0])
            if tree not in answered and self._is_silent(listing):
                named.silent += called
        named.revisions = len(names)

    def _revisions(self) -> list[tuple[str, str]]:
        """Return object and name of each ref and of each stash entry."""
        listed = self._run("for-each-ref", "--format=%(objectname) %(refname)").decode()
        refs = [line.split(" ", 1) for line in listed.splitlines()]
        found = [(object_id, name) for object_id, name in refs]
        for _, name in refs:
            # The older entries of a stash are in the log of its ref; DVC's queue is a stash too.
            if "stash" not in name and not name.startswith("refs/exps/celery/"):
                continue
            entries = self._run("log", "--walk-reflogs", "--format=%H %P", name, "--", check=False)
            for number, line in enumerate(entries.decode().splitlines()):
                commit, *parents = line.split()
                # The other parents are the index and the untracked files.
                found += [(one, f"{name}@{{{number}}}") for one in (commit, *parents[1:])]
        return found

    def _worktrees(self) -> list[tuple[Path, str | None]]:
        """Return each existing worktree with its commit."""
        found = []
        for block in os.fsdecode(self._run("worktree", "list", "--porcelain")).split("\n\n"):
            lines: dict[str, str] = {}
            for line in block.splitlines():
                key, _, value = line.partition(" ")
                lines[key] = value
            if "worktree" in lines and "bare" not in lines and Path(lines["worktree"]).is_dir():
                head = lines.get("HEAD", "")
                # All zeros before the first commit.
                found.append((Path(lines["worktree"]), head if head.strip("0") else None))
        return found

    def _trees(self, objects: Sequence[str]) -> dict[str, str]:
        """Return the tree of each object that has one; a tag may point to a file."""
        given = "".join(f"{one}^{{tree}}\n" for one in objects).encode()
        answers = self._run("cat-file", "--batch-check", given=given).decode().splitlines()
        trees = {}
        for one, answer in zip(objects, answers, strict=True):
            if not answer.endswith(" missing"):
                trees[one] = answer.split()[0]
            elif self._run("cat-file", "-t", one, check=False).strip() not in (b"blob", b"tag"):
                raise IntegrityError(
                    f"{self._project}: git has no object {one}, so its needs are unknown; run "
                    "`git fsck`, or fetch it"
                )
        return trees

    def _read_blobs(self, named: Named, blobs: dict[str, str], revision: str) -> None:
        for path, content in zip(blobs, self._contents(list(blobs.values())), strict=True):
            named.add(content, f"{revision}:{path}")

    def _contents(self, objects: Sequence[str]) -> list[bytes]:
        if not objects:
            return []
        output = self._run("cat-file", "--batch", given="".join(f"{o}\n" for o in objects).encode())
        contents, position = [], 0
        for one in objects:
            end = output.index(b"\n", position)
            header = output[position:end].split()
            if header[-1] == b"missing":
                raise IntegrityError(
                    f"{self._project}: git has no object {one}, so its needs are unknown; run "
                    "`git fsck`, or fetch it"
                )
            size = int(header[-1])
            contents.append(output[end + 1 : end + 1 + size])
            position = end + 2 + size
        return contents

    def _is_silent(self, listing: bytes) -> bool:
        """Tell whether a revision has a project with a capture stage but without manifests."""
        projects = {
            found["project"] for _, path in _entries(listing) if (found := MANIFEST.fullmatch(path))
        }
        silent = [
            blob
            for blob, path in _entries(listing)
            if (found := PIPELINE.fullmatch(path)) and found["project"] not in projects
        ]
        return any(CAPTURES in content for content in self._contents(silent))


def _entries(listing: bytes) -> list[tuple[str, bytes]]:
    """Return object and path of each file in the output of `ls-tree` or `ls-files --stage`."""
    found = []
    for entry in listing.split(b"\0"):
        words, _, path = entry.partition(b"\t")
        if path:
            # ls-tree: mode, type, object; ls-files: mode, object, stage.
            _, second, third = words.split()
            found.append(((second if len(third) == 1 else third).decode(), path))
    return found


def _manifests(listing: bytes) -> dict[str, str]:
    """Return the object of each manifest among listed files, by path."""
    return {os.fsdecode(path): blob for blob, path in _entries(listing) if MANIFEST.fullmatch(path)}
