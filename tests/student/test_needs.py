"""Which signals a student needs, decided from the JSON that capture leaves."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.provenance import write_json
from pipeline.store.forms.registry import FORMS
from pipeline.store.forms.value_int8 import ValueInt8
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.model.origin import StudentModel

LAYERS = 6
ALL = {
    "feature": {"weight": 1.0},
    "attention": {"weight": 1.0},
    "output": {"weight": 1.0},
    "labels": {"weight": 1.0},
}


def write_record(
    folder: Path, kind: str, layer: int | None, form: str, digest: str = "d", **more: Any
) -> None:
    place = kind if layer is None else f"{kind}/{layer}"
    name = f"{place}/{form}-00"
    record = {"signal": name, "kind": kind, "layer": layer, "form": form, "digest": digest}
    record |= more
    write_json(folder / f"{name.replace('/', '.')}.json", record)


@pytest.fixture
def manifests(tmp_path) -> Path:
    config = {"model_type": "llama", "num_hidden_layers": LAYERS}
    write_json(tmp_path / "store.json", {"store": "abc", "layers": LAYERS, "config": config})
    for layer in range(LAYERS + 1):
        write_record(tmp_path, "hidden", layer, "int8", f"h{layer}")
    for layer in range(1, LAYERS + 1):
        write_record(tmp_path, "attention", layer, "qk", f"a{layer}")
    write_record(tmp_path, "logits", None, "head", "l")
    write_json(tmp_path / "blocks.json", {"signal": "blocks", "layers": [2, 4, 6], "digest": "b"})
    return tmp_path


def select(manifests: Path, loss: dict = ALL, layers: Any = "uniform", **changes: Any) -> dict:
    embeddings = changes.pop("embeddings", True)
    arguments: dict[str, Any] = {
        "name": "small",
        "objective": Objective.model_validate(loss),
        "align": Alignment(layers=layers, embeddings=embeddings),
    }
    keys = {"architecture": {"num_hidden_layers": 3}}
    keys |= {key: changes.pop(key) for key in StudentModel.model_fields if key in changes}
    return select_signals(manifests, model=StudentModel(**keys), **arguments | changes)


def test_a_uniform_map_needs_every_second_layer(manifests):
    found = select(manifests)
    assert found["maps"]["feature"] == {"0": 0, "1": 2, "2": 4, "3": 6}
    assert found["maps"]["attention"] == {"1": 2, "2": 4, "3": 6}
    assert found["signals"] == {
        **{f"hidden/{layer}/int8-00": f"h{layer}" for layer in (0, 2, 4, 6)},
        **{f"attention/{layer}/qk-00": f"a{layer}" for layer in (2, 4, 6)},
        "logits/head-00": "l",
    }
    assert found["store"] == "abc"
    assert "0" not in select(manifests, embeddings=False)["maps"]["feature"]


def test_an_explicit_map_needs_its_layers(manifests):
    found = select(manifests, layers={1: 5, 3: 1})
    assert found["maps"] == {"feature": {"1": 5, "3": 1}, "attention": {"1": 5, "3": 1}}
    assert {name for name in found["signals"] if name.startswith("hidden")} == {
        "hidden/1/int8-00", "hidden/5/int8-00"
    }  # fmt: skip


def test_terms_that_are_off_need_nothing(manifests):
    found = select(manifests, {"labels": {"weight": 1.0}})
    assert found["signals"] == {}
    assert found["maps"] == {"feature": {}, "attention": {}}
    off = {"start": 0.0, "end": 0.0}
    assert select(manifests, {**ALL, "feature": {"weight": off}})["maps"]["feature"] == {}


def test_a_signal_captured_for_others_changes_nothing(manifests):
    before = select(manifests)
    write_record(manifests, "hidden", 5, "bfloat16")
    write_record(manifests, "attention", 5, "map")
    assert select(manifests) == before


def test_a_second_form_must_be_named(manifests):
    write_record(manifests, "hidden", 4, "bfloat16", "other")
    with pytest.raises(ConfigError, match=r"students\.small: hidden/4 is captured as .*name one"):
        select(manifests)
    named = {**ALL, "feature": {"weight": 1.0, "form": "int8"}}
    assert select(manifests, named)["signals"]["hidden/4/int8-00"] == "h4"


RELATIONS = {"attention": {"weight": 1.0, "loss": "relations"}}


def test_the_last_layers_alone(manifests):
    assert select(manifests, layers="last")["maps"] == {"feature": {"3": 6}, "attention": {"3": 6}}


def test_emd_needs_every_captured_layer(manifests):
    for layer in (1, 3, 5):
        (manifests / f"hidden.{layer}.int8-00.json").unlink()
    write_record(manifests, "attention", 6, "map")
    loss = {**ALL, "attention": {"weight": 1.0, "form": "map"}}
    found = select(manifests, loss, layers="emd")
    assert found["maps"]["feature"] == {"0": 0, "1": [2, 4, 6], "2": [2, 4, 6], "3": [2, 4, 6]}
    assert found["maps"]["attention"] == {"1": [6], "2": [6], "3": [6]}
    names = {name for name in found["signals"] if not name.startswith("logits")}
    assert names == {*(f"hidden/{n}/int8-00" for n in (0, 2, 4, 6)), "attention/6/map-00"}
    assert "0" not in select(manifests, loss, layers="emd", embeddings=False)["maps"]["feature"]
    loss = {"attention": {"weight": 1.0, "form": "below"}}
    with pytest.raises(IncompatibleError, match=r"small\.align\.layers: emd .* has none"):
        select(manifests, loss, layers="emd")


class Finer(ValueInt8):
    """A form that another package might give."""

    name: ClassVar[str] = "finer"
    rank: ClassVar[int] = 0


def test_relations_need_values_and_vectors(manifests, monkeypatch):
    monkeypatch.setitem(FORMS.ours, "value.finer", Finer)
    with pytest.raises(IncompatibleError, match=r"needs value/2, .*it has value none"):
        select(manifests, RELATIONS)
    for layer in (2, 4, 6):
        write_record(manifests, "value", layer, "int8")
        write_record(manifests, "attention", layer, "map")  # of no use, so no choice either
    write_record(manifests, "value", 4, "finer")
    assert set(select(manifests, RELATIONS)["signals"]) == {
        *(f"attention/{layer}/qk-00" for layer in (2, 4, 6)),
        *("value/2/int8-00", "value/4/finer-00", "value/6/int8-00"),
    }
    pairs = {"attention": {**RELATIONS["attention"], "relations": ["qq", "kk"]}}
    assert not [name for name in select(manifests, pairs)["signals"] if "value" in name]
    values = {"attention": {**RELATIONS["attention"], "relations": ["vv"]}}
    assert not [name for name in select(manifests, values)["signals"] if "attention" in name]


def test_relations_of_maps_are_refused(manifests):
    write_record(manifests, "attention", 2, "map")
    (manifests / "attention.2.qk-00.json").unlink()
    with pytest.raises(IncompatibleError, match=r"attention/2 is captured as maps alone; capture"):
        select(manifests, RELATIONS)


def below(manifests: Path) -> dict[str, Any]:
    for layer in range(1, LAYERS + 1):
        write_record(manifests, "attention", layer, "below", needs={"hidden": layer - 1})
    return {"attention": {"weight": 1.0, "form": "below"}}


def test_what_is_rebuilt_needs_the_hidden_state_below(manifests):
    attention = below(manifests)
    found = select(manifests, attention)
    assert set(found["signals"]) == {
        *(f"attention/{layer}/below-00" for layer in (2, 4, 6)),
        *(f"hidden/{layer}/int8-00" for layer in (1, 3, 5)),
    }
    (manifests / "hidden.3.int8-00.json").unlink()
    with pytest.raises(IncompatibleError, match="needs hidden/3, which is not in the store"):
        select(manifests, attention)


def test_what_is_rebuilt_takes_the_feature_terms_form_or_the_most_faithful(manifests):
    attention = below(manifests)
    for layer in range(LAYERS + 1):
        write_record(manifests, "hidden", layer, "bfloat16")
    names = select(manifests, attention)["signals"]
    assert {name for name in names if "hidden" in name} == {
        f"hidden/{layer}/bfloat16-00" for layer in (1, 3, 5)
    }
    both = attention | {"feature": {"weight": 1.0, "form": "int8"}}
    names = select(manifests, both, layers={1: 1, 2: 2, 3: 4})["signals"]
    assert {name for name in names if "hidden" in name} == {
        f"hidden/{layer}/int8-00" for layer in (0, 1, 2, 3, 4)
    }


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"architecture": {"num_hidden_layers": 5}}, None, ""),
        ({"layers": {0: 0}}, ConfigError, r"align\.layers: only pairs with layer 0.*attention\."),
        ({"layers": {4: 2}}, IncompatibleError, r"small\.align\.layers: student layer 4 .*0\.\.3"),
        ({"layers": {1: 9}}, IncompatibleError, r"small\.align\.layers: teacher layer 9 .*0\.\.6"),
        ({"layers": {}}, ConfigError, r"small\.align\.layers: the layer map is empty"),
        ({"loss": {"output": {"weight": 1.0, "form": "topk"}}}, IncompatibleError,
         r"needs logits in form topk, which is not in the store"),
        ({"init": "teacher-layers", "blocks": [1, 2, 3]}, IncompatibleError,
         r"blocks \[1, 2, 3\], the store's assets have \[2, 4, 6\]"),
        ({"init": "teacher-layers", "blocks": [2]}, IncompatibleError,
         r"small\.model\.blocks: 1 teacher blocks are listed, the student has 3"),
        ({"architecture": {"model_type": "gpt2"}}, ConfigError,
         r"students\.small\.model: no number of layers"),
    ],
)  # fmt: skip
def test_what_the_store_lacks_is_refused_by_name(changes, error, match, manifests):
    if error is None:
        assert set(select(manifests, **changes)["maps"]["attention"].values()) == {1, 2, 4, 5, 6}
        return
    with pytest.raises(error, match=match):
        select(manifests, **changes)


def test_a_missing_layer_names_what_is_there(manifests):
    (manifests / "hidden.4.int8-00.json").unlink()
    with pytest.raises(IncompatibleError, match=r"needs hidden/4, .*has hidden 0, 1, 2, 3, 5, 6"):
        select(manifests)


def test_blocks_are_pinned_for_a_start_from_the_teacher(manifests):
    found = select(manifests, init="teacher-layers")
    assert found["assets"] == {"blocks": {"digest": "b", "layers": [2, 4, 6]}}


def test_a_checkpoint_brings_its_depth_and_a_missing_one_is_named(manifests, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_json(tmp_path / "model" / "config.json", {"n_layer": 2, "model_type": "gpt2"})
    found = select(manifests, architecture=None, checkpoint=str(tmp_path / "model"))
    assert found["maps"]["attention"] == {"1": 3, "2": 6}
    where = "students.small.model.checkpoint nowhere/to-be-found: no configuration"
    with pytest.raises(ConfigError, match=where):
        select(manifests, architecture=None, checkpoint="nowhere/to-be-found")


def test_a_hub_checkpoint_is_that_of_its_revision(manifests, tmp_path, monkeypatch):
    """The cache may hold nothing but the revision: then nobody says what the newest one is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    write_json(snapshot / "config.json", {"n_layer": 2, "model_type": "gpt2"})
    found = select(manifests, architecture=None, checkpoint="some/model", revision=revision)
    assert found["maps"]["attention"] == {"1": 3, "2": 6}


def test_no_capture_yet_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no store\.json"):
        select(tmp_path)
