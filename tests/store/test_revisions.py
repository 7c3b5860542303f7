"""Every revision of a git repository is asked which signals it needs, and nothing is fetched."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import IntegrityError, ResourceError
from pipeline.store.upkeep.revisions import named_signals

MANIFEST = Path("data/manifests/main")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty repository, whatever the user's own configuration of git says."""
    for key in [key for key in os.environ if key.startswith("GIT")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "t")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "t@t")
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    return folder


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def name_only(folder: Path, signal: str, store: str = "s") -> None:
    """Let the working tree name one signal."""
    (folder / MANIFEST).mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST / "a.json").write_text(json.dumps({"store": store, "signal": signal}))


def commit(folder: Path, signal: str) -> str:
    """Commit a tree that names one signal; return the commit."""
    name_only(folder, signal)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", signal)
    return git(folder, "rev-parse", "HEAD")


def names(folder: Path) -> set[str]:
    found = named_signals([folder])
    assert found.in_git
    assert set(found.signals) <= {"s"}
    return set(found.signals["s"])


def test_every_kind_of_ref_is_asked(project):
    for ref in (
        "refs/heads/topic",
        "refs/remotes/origin/theirs",
        "refs/tags/v1",
        "refs/exps/ab/cdef/exp-1",
        "refs/exps/stash",
        "refs/exps/celery/failed",
    ):
        git(project, "update-ref", "--create-reflog", ref, commit(project, ref))
    tagged = commit(project, "annotated")
    git(project, "tag", "-am", "x", "annotated", tagged)
    detached = commit(project, "detached")
    git(project, "checkout", "-q", "--detach", detached)
    git(project, "branch", "-qf", "main", commit(project, "head"))
    git(project, "checkout", "-q", "--detach", detached)
    found = names(project)
    assert {"refs/heads/topic", "refs/remotes/origin/theirs", "refs/tags/v1"} <= found
    assert {"refs/exps/ab/cdef/exp-1", "refs/exps/stash", "refs/exps/celery/failed"} <= found
    assert {"annotated", "detached", "head"} <= found


def test_history_is_not_asked(project):
    commit(project, "old")
    commit(project, "new")
    assert names(project) == {"new"}


def test_stashes_are_asked_all_of_them_with_index_and_unknown_files(project):
    commit(project, "base")
    for number in range(3):
        name_only(project, f"stashed-{number}")
        other = project / MANIFEST / "b.json"
        other.write_text(json.dumps({"store": "s", "signal": f"untracked-{number}"}))
        git(project, "stash", "--include-untracked", "-q")
    name_only(project, "staged")
    git(project, "add", "-A")
    name_only(project, "worked")
    git(project, "stash", "-q")
    every = {f"{kind}-{i}" for kind in ("stashed", "untracked") for i in range(3)}
    assert names(project) == every | {"base", "staged", "worked"}


def test_queued_experiments_are_asked_all_of_them(project):
    """DVC keeps its queue in a ref with a log, as a stash is one."""
    base = commit(project, "base")
    for ref in ("refs/exps/stash", "refs/exps/celery/stash"):
        for number in range(3):
            queued = commit(project, f"{ref}-{number}")
            git(project, "update-ref", "--create-reflog", "-m", "q", ref, queued)
            git(project, "reset", "-q", "--hard", base)
    expected = {
        f"{ref}-{i}" for ref in ("refs/exps/stash", "refs/exps/celery/stash") for i in range(3)
    }
    assert names(project) == expected | {"base"}


def test_index_working_tree_and_other_worktrees_are_asked(project, tmp_path):
    commit(project, "base")
    git(project, "worktree", "add", "-q", str(tmp_path / "other"))
    name_only(tmp_path / "other", "other's index")
    git(tmp_path / "other", "add", "-A")
    name_only(tmp_path / "other", "other's file")
    name_only(project, "index")
    git(project, "add", "-A")
    name_only(project, "file")
    expected = {"base", "index", "file", "other's index", "other's file"}
    assert names(project) == names(tmp_path / "other") == expected


def test_a_project_below_the_top_of_its_repository(project):
    inner = project / "deep" / "inner"
    inner.mkdir(parents=True)
    name_only(inner, "inner")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "x")
    git(project, "mv", "deep", "moved")
    git(project, "commit", "-qm", "y")
    name_only(inner, "now")
    assert names(inner) == {"inner", "now"}


def test_before_the_first_commit_the_files_are_asked(project):
    name_only(project, "first")
    assert names(project) == {"first"}


def test_a_revision_that_captures_without_manifests_is_silent(project):
    (project / "dvc.yaml").write_text("outs: [data/manifests/main]")
    (project / ".gitignore").write_text("data\n")
    name_only(project, "a")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "start")
    # What is checked out is answered for by the manifests that lie beside it.
    assert named_signals([project]).silent == []
    git(project, "tag", "v1")
    (project / "notes").write_text("x")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "more")
    assert named_signals([project]).silent == ["refs/tags/v1"]
    (project / MANIFEST / "a.json").unlink()
    assert set(named_signals([project]).silent) == {
        "refs/heads/main", "refs/tags/v1", f"HEAD of {project}",
    }  # fmt: skip


def test_a_tag_of_a_file_is_no_revision(project):
    commit(project, "base")
    git(project, "tag", "file", git(project, "rev-parse", f"HEAD:{MANIFEST}/a.json"))
    git(project, "tag", "-am", "x", "annotated-file", "file")
    assert names(project) == {"base"}


def test_a_revision_that_cannot_be_read_is_an_error(project):
    commit(project, "base")
    bad = project / MANIFEST / "a.json"
    bad.write_text("{")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "bad")
    git(project, "branch", "broken")
    git(project, "reset", "-q", "--hard", "HEAD~1")
    with pytest.raises(IntegrityError, match=r"refs/heads/broken:data/manifests/main/a\.json"):
        named_signals([project])


def test_a_missing_object_is_an_error_and_not_fetched(project):
    lost = commit(project, "lost")
    blob = git(project, "rev-parse", f"{lost}:{MANIFEST}/a.json")
    git(project, "branch", "old")
    commit(project, "base")
    (project / ".git/objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(IntegrityError, match=f"git has no object {blob}"):
        named_signals([project])


def test_git_that_cannot_be_asked_is_an_error_and_no_git_is_none(project, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    name_only(tmp_path / "plain", "here")
    found = named_signals([tmp_path / "plain"])
    assert (found.signals, found.in_git) == ({"s": {"here"}}, False)
    (project / ".git/HEAD").write_text("nonsense")
    with pytest.raises(ResourceError, match=r"git for-each-ref failed .*: without it the"):
        named_signals([project])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourceError, match="git is not on PATH"):
        named_signals([project])


def test_workspaces_of_running_experiments_are_asked(tmp_path):
    name_only(tmp_path, "here")
    name_only(tmp_path / ".dvc/tmp/exps/tmpabc", "running")
    name_only(tmp_path / ".dvc/tmp/exps/standalone/tmpdef", "alone")
    name_only(tmp_path / "experiment", "there")
    found = named_signals([tmp_path / "experiment", tmp_path])
    assert found.signals == {"s": {"here", "running", "alone", "there"}}
