"""A family through the whole life: asked of `check`, then captured, taught, exported and loaded.

What `check` says yes to must work, and what it says no to must be one line.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.errors import DecantError
from pipeline.planning.miniatures import check_student_model, check_teacher_model
from pipeline.runtime import Runtime
from pipeline.store.signals import Signal
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.loop.train import train_student
from pipeline.student.loop.training import Training
from pipeline.student.model.origin import StudentModel
from pipeline.student.parameters import StudentParams
from pipeline.taps.check import TapRequest
from pipeline.taps.configuration import NOT_ARCHITECTURE, auto_class, settable_keys
from pipeline.taps.miniature import MOST_PARAMETERS, check_in_miniature
from pipeline.teacher.parameters.model import TeacherModel
from pipeline.teacher.source.reference import TeacherReference
from pipeline.training.options import TrainOptions
from tests.captured import OPTIONS, VOCAB, Captured, signal, write_rows, write_teacher
from tests.families.configs import small_config
from tests.tiny import tiny_model

ROW = 32
ATTENTION = {
    "qk": ("attention", "qk", {}),
    "below": ("attention", "below", {}),
    "map": ("attention", "map", {}),
    "value": ("value", "int8", {}),
}
FOREIGN = {"causal-lm": "llama", "classification": "bert"}
"""The teacher of a student of another family."""


@dataclass
class Life:
    """What became of a family; a `broken` one was promised more by `check` than it could keep."""

    family: str
    task: str
    hidden: bool = False
    outputs: bool = False
    attention: list[str] = field(default_factory=list)
    student: str = "no"
    foreign: str = "no"
    teacher_layers: str = "no"
    reason: str = ""
    broken: list[str] = field(default_factory=list)


def live(family: str, task: str, root: Path, teachers: Callable[[str], Captured]) -> Life:
    """Take a family through everything.

    Args:
        family: Its model type.
        task: What the models' heads are for.
        root: An empty directory.
        teachers: Gives the captured teacher of another family for a task.
    """
    life = Life(family, task)
    try:
        config = small_config(family)
        with torch.device("meta"):
            outline = auto_class(task).from_config(config)
        if outline.num_parameters() > MOST_PARAMETERS:
            life.reason = "not tried: no small sizes are known for it"
            return life
    except Exception as error:  # noqa: BLE001 - a family that cannot be made small is not judged
        life.reason = f"not tried: {_short(error)}"
        return life
    if config.is_encoder_decoder:
        try:
            check_in_miniature(config, task, TapRequest(), where=family, max_length=ROW)
        except DecantError as error:
            life.reason = str(error).removeprefix(f"{family}: ")
            return life
    store = _teacher(life, config, root)
    if store is not None:
        life.student = _student(life, store, root / "own", {}, "random")
        if life.hidden:
            life.teacher_layers = _student(life, store, root / "blocks", {}, "teacher-layers")
    if life.reason.startswith("not tried"):
        return life
    keys = {
        key: value
        for key, value in config.to_dict().items()
        if key in settable_keys(type(config)) - NOT_ARCHITECTURE
        and value is not None
        and not key.endswith("_token_id")
        and "inf" not in repr(value)  # no parameter can say that
    }
    foreign = {**keys, "model_type": config.model_type}
    life.foreign = _student(life, teachers(task), root / "foreign", foreign, "random")
    return life


def foreign_teacher(task: str, root: Path) -> Captured:
    """Capture what students of other families learn from."""
    kind: Any = FOREIGN[task]
    store = Captured(root, task, OPTIONS)
    write_rows(store.tokens, task=task, token_types=kind == "bert", max_length=ROW)
    write_teacher(store.teacher, tiny_model(kind, task=task, layers=2))
    signals = [*_outputs(task), *(signal("hidden", layer, "float16") for layer in (0, 1, 2))]
    store.capture(signals)
    store.manifests(signals)
    return store


def _outputs(task: str) -> list[Signal]:
    return [signal("logits", None, "dense" if task == "classification" else "head")]


def _teacher(life: Life, config: PreTrainedConfig, root: Path) -> Captured | None:
    """Ask which signals the family gives, and capture all of them."""
    task = life.task
    store = Captured(root, task, OPTIONS)
    write_rows(store.tokens, task=task, token_types=False, max_length=ROW)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = auto_class(task).from_config(config)
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            model.eval()(input_ids=ids)
        write_teacher(store.teacher, model)
    except Exception as error:  # noqa: BLE001 - whatever the family's code raises
        life.reason = f"not tried: {_short(error)}"
        return None
    depth = TeacherReference.load(store.teacher).layers

    def asks(signals: list[Signal], *, blocks: bool = False) -> bool:
        try:
            found = check_teacher_model(
                "teachers.main",
                TeacherModel(path=str(store.teacher / "model")),
                signals,
                keeps_blocks=blocks,
                task=task,
                max_length=ROW,
                vocab=None,
            )
        except DecantError as error:
            if "\n" in str(error):
                life.broken.append(f"more than one line: {_short(error)}")
            life.reason = life.reason or str(error).removeprefix("teachers.main: ")
            return False
        if found is None:
            life.reason = "not tried: its miniature does not run"
        return found is not None

    wanted: list[Signal] = []
    if asks(_outputs(task)):
        life.outputs, wanted = True, _outputs(task)
    elif task == "causal-lm" and asks([signal("logits", None, "topk", k=8)]):
        life.outputs, wanted = True, [signal("logits", None, "topk", k=8)]
    hidden = [signal("hidden", layer, "float16") for layer in range(depth + 1)]
    if asks(hidden):
        life.hidden = True
        wanted += hidden
    for name, (kind, form, options) in ATTENTION.items():
        if name == "below" and not life.hidden:
            continue
        for layer in range(depth, 0, -1):
            one = [signal(kind, layer, form, **options)]
            if asks(one):
                life.attention.append(f"{name} {layer}")
                wanted += one
                break
    if not wanted:
        return None
    blocks = list(range(1, depth + 1)) if life.hidden and asks([], blocks=True) else []
    try:
        store.capture(wanted, blocks=blocks)
        store.manifests(wanted, blocks)
    except Exception as error:  # noqa: BLE001 - a broken promise of check, whatever it is
        life.broken.append(f"capture: {_short(error)}")
        return None
    return store


def _student(
    life: Life, store: Captured, root: Path, architecture: Mapping[str, Any], init: str
) -> str:
    """Select, check, train a step, export, load: with all terms that the check lets through."""
    teacher = TeacherReference.load(store.teacher).config
    index = store.index["signals"]
    has_hidden = any(name.startswith("hidden/") for name in index)
    attended = sorted(int(name.split("/")[1]) for name in index if name.startswith(("attention/",)))
    forms = [name for name in index if attended and name.startswith(f"attention/{attended[-1]}/")]
    is_own = not architecture
    layer = attended[-1] if attended and is_own else None
    terms: list[tuple[str, dict[str, Any], dict[int, int]]] = []
    output = {"output": {"weight": 1.0}}
    if not any(name.startswith("logits/") for name in index):
        output = {"labels": {"weight": 1.0}, "output": {"weight": 0.0}}
    feature = {"feature": {"weight": 1.0}} if has_hidden else {}
    if layer is not None and forms:
        form = forms[0].split("/")[2].split("-")[0]
        attention = {"attention": {"weight": 1.0, "form": form}}
        terms.append(("all terms", {**output, **feature, **attention}, {layer: layer}))
    if has_hidden:
        last = max(int(name.split("/")[1]) for name in index if name.startswith("hidden/"))
        terms.append(("features and outputs", {**output, **feature}, {last: last}))
    terms.append(("outputs", output, {}))
    for said, loss, layers in terms:
        found = _trained(
            life, store, root / said.replace(" ", "-"), architecture, init, loss, layers, teacher
        )
        if found is None:
            return said
        if found.startswith("broken"):
            life.broken.append(f"{init} student, {said}: {found}")
            return "broken"
    return "no"


def _trained(
    life: Life,
    store: Captured,
    root: Path,
    architecture: Mapping[str, Any],
    init: str,
    loss: dict[str, Any],
    layers: dict[int, int],
    teacher: Mapping[str, Any],
) -> str | None:
    """Return None if a student came of it, else what `check` said, or what broke."""
    objective = Objective.model_validate(loss)
    align = Alignment(layers=layers) if layers else Alignment()
    params = StudentParams(
        teacher="main",
        model=StudentModel(architecture=dict(architecture), init=init),  # pyright: ignore[reportArgumentType]
        loss=objective,
        align=align,
    )
    try:
        selected = select_signals(
            store.root / "manifests",
            name="tiny",
            objective=objective,
            align=align,
            model=params.model,
        )
        check_student_model(
            "tiny",
            params,
            teacher,
            selected,
            task=life.task,
            max_length=ROW,
            is_causal=None,
        )
    except DecantError as error:
        life.reason = life.reason or str(error)
        return str(error)
    try:
        train_student(
            Training(
                name="tiny",
                selected=selected,
                stores=store.stores,
                output=root / "student",
                curve=root / "curve.csv",
                work=root / "work",
                student=StudentParams(
                    teacher="main",
                    model=params.model,
                    loss=objective,
                    train=TrainOptions(steps=1, batch_size=2, learning_rate=1e-3, log_every=1),
                    pool_segments=2,
                ),
                runtime=Runtime(device="cpu"),
            )
        )
        model = auto_class(life.task).from_pretrained(root / "student").eval()
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        if not logits.isfinite().all() or logits.shape[-1] not in (2, VOCAB):
            return f"broken: logits of shape {list(logits.shape)} after the export"
    except Exception as error:  # noqa: BLE001 - a broken promise of check, whatever it is
        return f"broken: {_short(error)}"
    return None


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def as_row(life: Life) -> dict[str, Any]:
    """Return a life as JSON values."""
    return dataclasses.asdict(life)
