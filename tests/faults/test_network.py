"""What listens, what is looked up, and what is run: nothing but what was asked for."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.teacher.parameters.model import TeacherModel
from pipeline.teacher.source.load import load_pretrained, load_teacher
from pipeline.teacher.source.teach import teach
from tests.cases import ROOT
from tests.faults.forked import Child, decant, start
from tests.faults.small_project import CAPTURE, STUDENT, SmallProject, small_project

STAGES = (("capture", "main"), ("select", "small"), ("train", "small"))
LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000")
"""127.0.0.1 and ::1 as the kernel writes them."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"
AUTO_MAP = {"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    return small_project(tmp_path_factory.mktemp("bare") / "project")


@pytest.fixture
def project(bare, tmp_path) -> SmallProject:
    return bare.copy(tmp_path / "project")


def sockets_of(session: int) -> set[str]:
    """Return the inodes of all sockets that processes of a session have open."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                links = [str(link.readlink()) for link in process.joinpath("fd").iterdir()]
                found |= {link[8:-1] for link in links if link.startswith("socket:[")}
        except OSError:
            continue
    return found


def listening() -> dict[str, str]:
    """Return the address of each socket that listens on this machine, by inode, as `ss -ltn`."""
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    return {row[9]: row[1].partition(":")[0] for row in rows if row[3] == LISTENING}


def listeners_during(child: Child) -> tuple[set[str], int]:
    """Look until a child ends; return the addresses its processes listened on, and the looks."""
    found: set[str] = set()
    looks = 0
    while child.is_running():
        mine = sockets_of(child.pid)
        found |= {address for inode, address in listening().items() if inode in mine}
        looks += 1
    return found, looks


def listen() -> None:
    """Listen for a moment, to show that it would be seen."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        for _ in range(200):
            server.settimeout(0.001)
            try:
                server.accept()
            except TimeoutError:
                continue


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
@pytest.mark.usefixtures("unsynced")
def test_no_stage_listens(project, tmp_path, ledger):
    child = start(listen, stderr=tmp_path / "listen.stderr")
    assert listeners_during(child)[0] == {LOOPBACK[0]}
    for stage in STAGES:
        child = start(decant, *stage, cwd=project.root, stderr=tmp_path / f"{stage[0]}.stderr")
        addresses, looks = listeners_during(child)
        assert child.wait() == 0, child.errors()
        ledger.record("listening: a stage", detected=not addresses)
        assert addresses == set()
        assert looks > 1


def without_network(*stages: tuple[str, ...]) -> None:
    """Run stages where there is no network at all, not even this machine's own."""
    new_user, new_network = 0x10000000, 0x40000000
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(new_network) and library.unshare(new_user | new_network):
        sys.exit(99)
    with socket.socket() as probe:
        try:
            probe.connect(("127.0.0.1", 9))
        except OSError as error:
            assert "unreachable" in str(error)  # noqa: PT017
    for stage in stages:
        try:
            decant(*stage)
        except SystemExit as end:
            assert not end.code, end.code  # noqa: PT017


@pytest.mark.usefixtures("unsynced")
def test_both_stages_pass_offline(project, tmp_path, ledger):
    child = start(without_network, *STAGES, cwd=project.root, stderr=tmp_path / "stderr")
    code = child.wait()
    if code == 99:
        pytest.skip("no network namespaces here")
    ledger.record("no network: capture and train", detected=code == 0)
    assert code == 0, child.errors()
    assert (project.student / "model.safetensors").exists()


@pytest.mark.slow
def test_both_stages_pass_offline_in_a_shell(project, ledger):
    """The same from a shell, told nothing of being offline: no look-up is even tried for long."""
    prefix = next(
        (
            [*command]
            for command in (("unshare", "-n"), ("unshare", "-rn"))
            if shutil.which("unshare")
            and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
        ),
        None,
    )
    if prefix is None:
        pytest.skip("no network namespaces here")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    for stage in STAGES:
        command = [*prefix, sys.executable, "-m", "stages.cli", *stage]
        result = subprocess.run(
            command,
            cwd=project.root,
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
        ledger.record(f"no network: {stage[0]}", detected=result.returncode == 0)
        assert result.returncode == 0, result.stderr
    assert (project.student / "model.safetensors").exists()


def give_code(model: Path, canary: Path, **config_keys: Any) -> None:
    """Make a model one that brings code, which would write a canary if it ran."""
    config = json.loads((model / "config.json").read_text())
    config.update(config_keys)
    (model / "config.json").write_text(json.dumps(config))
    (model / "canary.py").write_text(
        f"from pathlib import Path\nPath({str(canary)!r}).write_text('ran')\n"
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"auto_map": AUTO_MAP},
        {"auto_map": AUTO_MAP, "model_type": "foreign"},
        {"attn_implementation": "somebody/kernel"},
    ],
    ids=["known", "foreign", "kernel"],
)
@pytest.mark.usefixtures("unsynced")
def test_a_teachers_own_code_is_refused_and_does_not_run(keys, project, tmp_path, ledger):
    """Also where transformers knows the architecture and would pass the code over in silence."""
    canary = tmp_path / "canary"
    model = shutil.copytree(project.teacher / "model", tmp_path / "model")
    give_code(model, canary, **keys)
    arguments: dict[str, Any] = {
        "name": "main", "tokens": project.data / "corpus" / "tokens" / "main",
        "output": tmp_path / "teacher", "work": tmp_path / "work", "scratch": None,
        "path": str(model), "revision": None, "trust_remote_code": False, "fit": None,
        "device": "cpu",
    }  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        teach(**arguments)
    line = str(raised.value)
    is_said = line.startswith("teachers.main.model.trust_remote_code: ") and str(model) in line
    ledger.record("auto_map: teacher", detected=is_said, wrong=canary.exists())
    assert is_said, line
    assert not canary.exists()
    assert not (tmp_path / "teacher").exists()
    with pytest.raises(ConfigError, match=r"set model\.trust_remote_code: true and pin"):
        load_pretrained(str(model), task="causal-lm", revision=None, trust_remote_code=False)
    elsewhere = {key: f"somebody/else--{place}" for key, place in AUTO_MAP.items()}
    give_code(model, canary, auto_map=elsewhere)
    with pytest.raises(ConfigError, match=r"main\.model\.path: .* in another repository \(someb"):
        teach(**{**arguments, "trust_remote_code": True, "revision": COMMIT})
    ledger.record("auto_map: another repository", wrong=canary.exists())
    assert not canary.exists()


@pytest.mark.parametrize(
    ("revision", "words"),
    [(None, "needs a pinned revision"), ("main", "expected a commit of 40 hexadecimal digits")],
)
def test_code_without_a_pinned_revision_is_refused(revision, words, project, tmp_path, ledger):
    params = project.root / "params.yaml"
    model = {"path": "somebody/model", "trust_remote_code": True, "revision": revision}
    project.parameters(CAPTURE, STUDENT)
    text = params.read_text().replace("path: unused", "\n".join(
        f"{'' if i == 0 else '      '}{key}: {json.dumps(value)}"
        for i, (key, value) in enumerate(model.items())
    ))  # fmt: skip
    params.write_text(text)
    child = start(decant, "teach", "main", cwd=project.root, stderr=tmp_path / "stderr")
    code = child.wait()
    line = child.error_line()
    is_said = words in line and "teachers.main.model" in line
    ledger.record("auto_map: no pinned revision", detected=code == 2 and is_said)
    assert code == 2
    assert is_said, line


OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.usefixtures("unsynced")
def test_the_code_of_a_directory_is_pinned_by_what_it_is(project, tmp_path, ledger, monkeypatch):
    """A directory has no revision: its code runs as `teach` found it, and not once it is edited."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = shutil.copytree(project.teacher / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(OWN_MODEL)
    assert TeacherModel(path=str(model), trust_remote_code=True).revision is None
    tokens = project.data / "corpus" / "tokens" / "main"
    reference = teach(
        name="main", tokens=tokens, output=tmp_path / "teacher", work=tmp_path / "work",
        scratch=None, path=str(model), revision=None, trust_remote_code=True, fit=None,
        device="cpu",
    )  # fmt: skip
    options: dict[str, Any] = {
        "task": "causal-lm", "device": torch.device("cpu"), "dtype": torch.float32,
    }  # fmt: skip
    loaded = load_teacher(tmp_path / "teacher", reference, **options)
    assert type(loaded).__name__ == "OwnModel"
    canary = tmp_path / "canary"
    give_code(model, canary)
    with pytest.raises(IncompatibleError, match=r"code [0-9a-f]{16}, expected [0-9a-f]{16} as the"):
        load_teacher(tmp_path / "teacher", reference, **options)
    ledger.record("auto_map: edited code", wrong=canary.exists())


@pytest.mark.usefixtures("unsynced")
def test_a_students_checkpoint_runs_no_code_of_its_own(project, tmp_path, ledger):
    canary = tmp_path / "canary"
    checkpoint = shutil.copytree(project.teacher / "model", project.root / "start")
    give_code(checkpoint, canary, auto_map=AUTO_MAP)
    student = {**STUDENT, "model": {"checkpoint": "start"}, "loss": {"labels": {"weight": 1.0}}}
    project.parameters(CAPTURE, student)
    for stage in STAGES[:2]:
        child = start(decant, *stage, cwd=project.root, stderr=tmp_path / f"{stage[0]}.stderr")
        assert child.wait() == 0, child.errors()
    child = start(decant, *STAGES[2], cwd=project.root, stderr=tmp_path / "stderr")
    code = child.wait()
    is_said = "model.checkpoint start: brings code of its own" in child.error_line()
    ledger.record("auto_map: student", detected=code == 2 and is_said, wrong=canary.exists())
    assert code == 2
    assert is_said
    assert not canary.exists()
    assert not project.student.exists()
