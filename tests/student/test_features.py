"""The teacher's side of a batch: every form of attention and output against the live teacher."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.student.align.chunked import chunked_map_loss
from pipeline.student.data import features as module
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.data.stream import StoreDataset
from pipeline.student.losses.attention import attention_kl
from pipeline.taps.inputs import model_columns
from pipeline.taps.scores import ALL, visible_keys
from pipeline.taps.tap import tap
from tests.captured import Captured, prepared, signal
from tests.tiny import CAUSAL, Kind, tiny_model

LAYERS = (1, 3)
KL_BOUND = {"qk": 5e-4, "map": 2e-4, "float16": 2e-6, "int8": 4e-4}
"""Mean KL of a decoded row from the true one, at lengths of 3 to 20: of `below` by hidden form."""
SHARP = {"llama", "qwen3", "gpt2", "bert", "distilbert", "gpt_neox", "roberta"}


def below_signals(hidden: str) -> list:
    return [
        *(signal("hidden", layer - 1, hidden) for layer in LAYERS),
        *(signal("attention", layer, "below") for layer in LAYERS),
    ]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of a teacher with every form of attention that it has, made when first asked for."""
    made: dict[str, Captured] = {}

    def get(kind: Kind) -> Captured:
        if kind not in made:
            store = prepared(tmp_path_factory.mktemp(kind), kind)
            signals = [signal("attention", layer, "map") for layer in LAYERS]
            if kind in SHARP:
                signals += [signal("attention", layer, "qk") for layer in LAYERS]
                signals += [signal("value", layer, "int8") for layer in LAYERS]
                signals += [*below_signals("float16"), *below_signals("int8")]
            if kind in CAUSAL:
                signals.append(signal("logits", None, "sampled", n=16))
            store.capture(list({one.name: one for one in signals}.values()))
            made[kind] = store
        return made[kind]

    return get


def opened(store: Captured, signals: list, **options: Any) -> tuple[TeacherFeatures, dict]:
    """Features, and a ragged batch of two segments in no particular order."""
    reader = store.pinned(signals)
    names = [one.name for one in signals]
    dataset = StoreDataset(reader, names)
    assert dataset.segment[0] != dataset.segment[-1]
    last = len(dataset) - 1
    batch = dataset.__getitems__([last, 2, 0, last - 1, 1])
    assert batch["attention_mask"].sum(-1).min() < batch["attention_mask"].shape[1]
    return TeacherFeatures(reader, names, **options), batch


def own_maps(model: PreTrainedModel, batch: dict) -> tuple[Tensor, ...]:
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model(**model_columns(model, batch), output_attentions=True).attentions


def whole_maps(features: TeacherFeatures, layer: int, batch: dict) -> Tensor:
    """Log of a layer's maps, which the product itself only makes some rows of at a time."""
    live = batch["attention_mask"].bool()
    rule = features.declaration("attention", layer).info["rule"]
    visible = visible_keys(live.sum(1), live.shape[1], rule)
    return features.attention_rows(layer, batch)(ALL, ALL, visible)


def divergence(true: Tensor, found: Tensor, live: Tensor) -> float:
    """Mean KL of live rows of probabilities from log-probabilities."""
    ratio = torch.where(true > 0, true, 1.0).log() - torch.where(true > 0, found, 0.0)
    return float((true * ratio).sum(-1).transpose(1, 2)[live].mean())


def attention_of(form: str) -> tuple[list, float]:
    if form.startswith("below-"):
        hidden = form.removeprefix("below-")
        return below_signals(hidden), KL_BOUND[hidden]
    return [signal("attention", layer, form) for layer in LAYERS], KL_BOUND[form]


@pytest.mark.parametrize("form", ["qk", "map", "below-float16", "below-int8"])
@pytest.mark.parametrize("kind", sorted(SHARP))
def test_rebuilt_maps_are_the_teachers_within_the_forms_error(kind, form, stores):
    signals, bound = attention_of(form)
    features, batch = opened(stores(kind), signals)
    live = batch["attention_mask"].bool()
    with torch.no_grad():
        maps = own_maps(stores(kind).load_teacher(), batch)
    for layer in LAYERS:
        found = whole_maps(features, layer, batch)
        assert divergence(maps[layer - 1], found, live) < bound
        sums = found.exp().sum(-1).transpose(1, 2)[live]
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
        assert not found.exp().transpose(1, 2)[~live].any()
        # Rows of other examples are far away, so the comparison means something.
        assert divergence(maps[layer - 1].roll(1, 0), found, live & live.roll(1, 0)) > 100 * bound


@pytest.mark.parametrize("kind", ["deberta_v2", "gemma2", "mistral"])
def test_what_query_and_key_cannot_say_is_kept_as_a_map(kind, stores):
    """A position bias, a soft cap, a window that the rows outgrow."""
    signals, bound = attention_of("map")
    features, batch = opened(stores(kind), signals)
    live = batch["attention_mask"].bool()
    teacher = stores(kind).load_teacher()
    with torch.no_grad():
        maps = own_maps(teacher, batch)
    for layer in LAYERS:
        found = whole_maps(features, layer, batch)
        error = (found.exp() - maps[layer - 1]).abs().transpose(1, 2)[live]
        assert error.max() < 0.01
        assert divergence(maps[layer - 1], found, live) < 2 * bound
    rule = features.declaration("attention", 1).info["rule"]
    assert rule == ("causal" if kind in CAUSAL else "full")


@pytest.mark.parametrize("form", ["map", "below-float16"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_step_from_the_store_is_the_step_beside_the_teacher(kind, form, stores):
    """Value and every gradient of the attention term; swapping two examples fails it."""
    store = stores(kind)
    signals, _ = attention_of(form)
    features, batch = opened(store, signals)
    live = batch["attention_mask"].bool()
    student = tiny_model(kind, layers=2, width=16, seed=5)
    twin = copy.deepcopy(student)
    rule = "causal" if kind in CAUSAL else "full"

    def stored(pieces: dict) -> Tensor:
        with tap(student, attention=[2]) as record:
            student(**model_columns(student, batch))
        vectors = record.query[2], record.key[2], record.scaling[2]
        told = features.attention_rows(3, batch | {"features": pieces})
        count = int(live.sum())
        # Three query rows of an example at a time.
        few = {"count": count, "teacher_heads": 4, "scores": 3 * 4 * live.shape[1]}
        return chunked_map_loss(attention_kl, *vectors, told, live, rule, **few)

    with torch.no_grad():
        true = own_maps(store.load_teacher(), batch)[2]
    mine = own_maps(twin, batch)[1]
    seen = true > 0
    ratio = torch.where(seen, true, 1.0).log() - torch.where(seen, mine, 1.0).log()
    wanted = (true * ratio).sum(-1).mean(1)[live].mean()

    found = stored(batch["features"])
    bound = 1e-3 if form == "below-float16" else 5e-3
    torch.testing.assert_close(found, wanted, rtol=bound, atol=0)
    ours = torch.autograd.grad(found, list(student.parameters()), materialize_grads=True)
    theirs = torch.autograd.grad(wanted, list(twin.parameters()), materialize_grads=True)
    ours, theirs = (torch.cat([g.flatten() for g in part]) for part in (ours, theirs))
    assert (ours - theirs).norm() < 4 * bound * theirs.norm()
    swapped = {
        name: {part: value.flip(0) for part, value in parts.items()}
        for name, parts in batch["features"].items()
    }
    wrong = torch.autograd.grad(stored(swapped), list(student.parameters()), materialize_grads=True)
    assert (torch.cat([g.flatten() for g in wrong]) - theirs).norm() > 0.2 * theirs.norm()


@pytest.mark.parametrize("form", ["qk", "below-float16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert"])
def test_vectors_are_the_teachers_and_zero_at_padding(kind, form, stores):
    """With grouped queries there are fewer keys than queries; values come with the keys."""
    signals, _ = attention_of(form)
    signals += [signal("value", layer, "int8") for layer in LAYERS]
    features, batch = opened(stores(kind), signals)
    live = batch["attention_mask"].bool()
    teacher = stores(kind).load_teacher(attention="sdpa")
    with torch.no_grad(), tap(teacher, attention=LAYERS, values=LAYERS) as record:
        teacher(**model_columns(teacher, batch))
    kv_heads = 4 if kind == "bert" else 2
    for layer in LAYERS:
        vectors = features.attention_vectors(layer, batch)
        found = {**vectors, "value": features.values(layer, batch)}
        for name, true in (
            ("query", record.query), ("key", record.key), ("value", record.value)
        ):  # fmt: skip
            heads = 4 if name == "query" else kv_heads
            assert found[name].shape == (*live.shape[:1], heads, live.shape[1], 8)
            assert found[name].dtype == torch.float32
            assert not found[name].transpose(1, 2)[~live].any()
            ours, theirs = (x.transpose(1, 2)[live] for x in (found[name], true[layer]))
            step = theirs.abs().amax(-1, keepdim=True) / 127
            assert ((ours - theirs).abs() <= 0.51 * step + 2e-3).all()


def test_a_map_has_no_vectors_and_says_so(stores):
    signals, _ = attention_of("map")
    features, batch = opened(stores("llama"), signals)
    with pytest.raises(IncompatibleError, match=r"maps hold no query and key.*form qk or below"):
        features.attention_vectors(1, batch)


def test_attention_below_asks_for_the_hidden_state(stores):
    signals = [signal("attention", 3, "below"), signal("hidden", 0, "float16")]
    with pytest.raises(IncompatibleError, match="attention/3: rebuilt from hidden/2, which is not"):
        opened(stores("llama"), signals)


def test_rebuilding_leaves_no_trace_in_training(stores):
    """Neither parameters nor state nor anybody's random numbers; and no dropout in training."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    features, batch = opened(stores("bert"), below_signals("float16"))
    found = whole_maps(features.train(), 1, batch)
    assert torch.equal(before, torch.random.get_rng_state())
    assert list(features.parameters()) == []
    assert features.state_dict() == {}
    assert not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, whole_maps(features, 1, batch))


def test_samples_are_drawn_from_the_teachers_distribution(stores):
    store = stores("llama")
    one = signal("logits", None, "sampled", n=16)
    features, batch = opened(store, [one])
    samples = features.logits(*features.output_parts(batch)).samples
    assert samples is not None
    assert samples.dtype == torch.int64
    with torch.no_grad():
        teacher = store.load_teacher(attention="sdpa")
        logits = teacher(**model_columns(teacher, batch)).logits.flatten(0, 1)[
            batch["positions"]["targets"]
        ]
    counts = torch.zeros_like(logits).scatter_add(1, samples, torch.ones(samples.shape))
    assert ((counts - 16 * logits.softmax(-1)).abs() < 1 + 1e-3).all()
    with pytest.raises(IncompatibleError, match=r"temperature: 2\.0, but .* captured at \[1\.0\]"):
        opened(store, [one], temperature=2.0)
    with pytest.raises(IncompatibleError, match="keeps 3 of the teacher's 64 ids, and sampled"):
        opened(store, [one], vocabulary=torch.tensor([3, 1, 2]))


def test_a_students_vocabulary_has_the_teachers_logits_of_its_ids(captured):
    store = captured("llama")
    head = signal("logits", None, "head", values="float16")
    vocabulary = torch.tensor([5, 0, 63, 17])
    everything, batch = opened(store, [head])
    features, _ = opened(store, [head], vocabulary=vocabulary)
    parts = features.output_parts(batch)
    full = everything.logits(*parts).full
    some = features.logits(*parts).full
    assert full is not None
    assert some is not None
    assert some.shape == (len(full), 4)
    torch.testing.assert_close(some, full[:, vocabulary])
    topk = signal("logits", None, "topk", k=8, temperatures=(1.0, 2.0))
    with pytest.raises(IncompatibleError, match="keeps 4 of the teacher's 64 ids, and topk"):
        opened(store, [topk], vocabulary=vocabulary)
    dense = signal("logits", None, "dense")
    features, batch = opened(captured("bert"), [dense], vocabulary=vocabulary)
    assert features.output_parts(batch)[0].shape[1] == 2


def test_a_head_in_half_precision_stays_so_and_multiplies_in_float32(captured, monkeypatch):
    half = lambda *_: {"weight": weight.bfloat16(), "bias": bias.bfloat16()}  # noqa: E731
    store, declared = captured("llama"), signal("logits", None, "head", values="float16")
    weight, bias = torch.randn(64, 32), torch.randn(64)
    monkeypatch.setattr(module, "_own_asset", half)
    found, batch = opened(store, [declared])
    assert found.head_weight.dtype == torch.bfloat16
    parts = found.output_parts(batch)
    wanted = parts[0] @ weight.bfloat16().float().T + bias.bfloat16().float()
    for widened in (2**24, 5 * 32):
        monkeypatch.setattr(module, "WIDENED", widened)
        torch.testing.assert_close(found.logits(*parts).full, wanted)


def test_pair_rows_are_those_of_their_examples(stores):
    """Joined by identity: what a batch gets beside a row is what was captured for that row."""
    store = stores("bert")
    one = signal("attention", 1, "map")
    reader = store.pinned([one])
    dataset = StoreDataset(reader, [one.name])
    batch = dataset.__getitems__([7, 0, 5])
    counts = [int(n) ** 2 for n in dataset.length[[7, 0, 5]]]
    pieces = batch["features"][one.name]["levels"].split(counts)
    for i, piece in zip([7, 0, 5], pieces, strict=True):
        segment = reader.read_segment(int(dataset.segment[i]), [one.name])
        place = int(np.flatnonzero(segment.examples == dataset.examples[i])[0])
        rows = segment.length**2
        first = int(rows[:place].sum())
        expected = segment.features[one.name]["levels"][first : first + rows[place]]
        np.testing.assert_array_equal(piece.numpy(), expected)
