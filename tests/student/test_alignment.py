"""Unequal shapes, from the store and beside the live teacher: relations, other heads, transport."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.student.align.objective import Objective
from pipeline.student.align.transport import transport_plan
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.data.stream import StoreDataset
from tests.captured import Captured, signal
from tests.student import live
from tests.student.test_distiller import (
    FEATURE_MAP,
    TOPK,
    choose,
    difference,
    gradients,
    padded,
    ragged_batch,
    stored_terms,
    student_of,
    train_rows,
)

PAIRS = {1: 1, 2: 3}
BOUND = 1e-2  # that of the forms of query, key and value
OTHER_HEADS = {"llama": {"heads": 2, "kv_heads": 1}, "gpt2": {"heads": 8}, "bert": {"heads": 2}}


def build(
    store: Captured, signals: list, student: Any, sections: dict[str, Any], maps: dict[str, Any]
) -> Distiller:
    goal = Objective.model_validate(sections)
    features = TeacherFeatures(
        store.pinned(signals), [one.name for one in signals], temperature=goal.output.temperature
    )
    torch.manual_seed(1)
    both = {"feature": {}, "attention": {}} | maps
    return Distiller(student, features, goal, both, task=store.task)


def attention_signals(*kinds: str) -> list:
    forms = {"attention": "qk", "value": "int8"}
    return [signal(kind, layer, forms[kind]) for kind in kinds for layer in (1, 3)]


def eager(student: Any) -> Any:
    twin = copy.deepcopy(student)
    twin.set_attn_implementation("eager")
    return twin


def same_step(ours: Tensor, our_model: Any, theirs: Tensor, their_model: Any, bound=BOUND) -> None:
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=1e-7)
    found = gradients(ours, list(our_model.parameters()))
    wanted = gradients(theirs, list(their_model.parameters()))
    assert difference(found, wanted) < bound


@pytest.mark.parametrize("relations", [("qq", "kk", "vv"), ("vv",), ("kk", "qq")])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_relations_from_the_store_are_those_beside_the_teacher(kind, relations, captured):
    """Of students with fewer or more heads; llama groups its queries, in other groups."""
    store = captured(kind)
    kinds = ["attention"] * bool({"qq", "kk"} & set(relations)) + ["value"] * ("vv" in relations)
    signals = attention_signals(*kinds)
    batch = ragged_batch(store, signals)
    student = student_of(kind, None, **OTHER_HEADS[kind])
    section = {"weight": 1.0, "loss": "relations", "relations": relations}
    distiller = build(store, signals, student, {"attention": section}, {"attention": PAIRS})
    assert distiller._attention_match is not None
    heads = distiller._attention_match.relation_heads
    assert heads == (2 if kind == "llama" and relations == ("vv",) else 4)
    terms, _ = stored_terms(distiller, batch)
    teacher, twin, losses = store.load_teacher(), eager(student), []
    for s, t in PAIRS.items():
        with torch.no_grad():
            told = live.vectors(teacher, batch, t)
        losses.append(
            live.relations(
                told, live.vectors(twin, batch, s), batch["attention_mask"].bool(),
                names=relations, heads=heads, causal=kind != "bert",
            )
        )  # fmt: skip
    same_step(terms["attention"], student, torch.stack(losses).mean(), twin)


def live_maps(store: Captured, student: Any, batch: dict) -> tuple[Any, Any, Any]:
    with torch.no_grad():
        told = live.outputs(store.load_teacher(), batch)
    twin = eager(student)
    return told.maps, live.outputs(twin, batch).maps, twin


def map_kl(p: Tensor, q: Tensor, keep: Tensor) -> Tensor:
    seen = p > 0
    ratio = torch.where(seen, p, 1.0).log() - torch.where(seen, q, 1.0).log()
    return (p * ratio).sum(-1).mean(1)[keep].mean()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_head_mean_of_other_heads_is_that_beside_the_teacher(kind, captured):
    store, signals = captured(kind), attention_signals("attention")
    batch = ragged_batch(store, signals)
    student = student_of(kind, None, **OTHER_HEADS[kind])
    section = {"weight": 1.0, "loss": "head_mean"}
    distiller = build(store, signals, student, {"attention": section}, {"attention": PAIRS})
    terms, _ = stored_terms(distiller, batch)
    told, said, twin = live_maps(store, student, batch)
    keep = batch["attention_mask"].bool()
    losses = [
        map_kl(told[t - 1].mean(1, keepdim=True), said[s - 1].mean(1, keepdim=True), keep)
        for s, t in PAIRS.items()
    ]
    same_step(terms["attention"], student, torch.stack(losses).mean(), twin)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_maps_of_equal_query_heads_meet_whatever_the_key_heads(kv_heads, captured):
    """The teacher has four query heads on two key heads."""
    store, signals = captured("llama"), attention_signals("attention")
    batch = ragged_batch(store, signals)
    student = student_of("llama", None, kv_heads=kv_heads)
    distiller = build(store, signals, student, {"attention": {"weight": 1.0}}, {"attention": PAIRS})
    terms, _ = stored_terms(distiller, batch)
    told, said, twin = live_maps(store, student, batch)
    keep = batch["attention_mask"].bool()
    losses = [map_kl(told[t - 1], said[s - 1], keep) for s, t in PAIRS.items()]
    same_step(terms["attention"], student, torch.stack(losses).mean(), twin)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_transport_from_the_store_is_that_beside_the_teacher(kind, captured):
    """Two student layers choose between two teacher layers: the better of both assignments."""
    store = captured(kind)
    signals = [one for one in choose(store) if one.kind != "logits"]
    batch = ragged_batch(store, signals)
    student = student_of(kind, None)
    sections = {"feature": {"weight": 1.0}, "attention": {"weight": 1.0}}
    maps = {"feature": {0: 0, 1: [2, 3], 2: [2, 3]}, "attention": {1: [1, 3], 2: [1, 3]}}
    distiller = build(store, signals, student, sections, maps)
    terms, parameters = stored_terms(distiller, batch)
    teacher, twin = store.load_teacher(), eager(student)
    statistics = live.channel_statistics(teacher, train_rows(store), [0, 2, 3])
    bridges = copy.deepcopy(distiller.projectors.by_pair)
    with torch.no_grad():
        told = live.outputs(teacher, batch)
    said, keep = live.outputs(twin, batch), batch["attention_mask"].bool()

    def feature(s: int, t: int) -> Tensor:
        mean, deviation = statistics[t]
        bridge = bridges["0->0" if s == 0 else f"{s}->any"]
        assert isinstance(bridge, nn.Module)
        gap = bridge(said.hidden[s]) - (told.hidden[t] - mean) / deviation
        return gap[keep].square().mean()

    straight, crossed = feature(1, 2) + feature(2, 3), feature(1, 3) + feature(2, 2)
    wanted = (feature(0, 0) + torch.minimum(straight, crossed)) / 3
    theirs = [*twin.parameters(), *bridges.parameters()]
    torch.testing.assert_close(terms["feature"], wanted, rtol=2e-3, atol=0)
    assert difference(gradients(terms["feature"], parameters), gradients(wanted, theirs)) < 2e-3

    def attend(s: int, t: int) -> Tensor:
        return map_kl(told.maps[t - 1], said.maps[s - 1], keep)

    straight, crossed = attend(1, 1) + attend(2, 3), attend(1, 3) + attend(2, 1)
    same_step(terms["attention"], student, torch.minimum(straight, crossed) / 2, twin)


def test_one_student_layer_learns_from_all_teacher_layers_alike(captured):
    store = captured("llama")
    signals = [one for one in choose(store) if one.kind == "hidden"]
    batch = ragged_batch(store, signals)
    student = student_of("llama", None)
    sections = {"feature": {"weight": 1.0}}
    distiller = build(store, signals, student, sections, {"feature": {2: [2, 3]}})
    plan = transport_plan(torch.rand(1, 2))
    assert plan.tolist() == [[0.5, 0.5]]
    found = stored_terms(distiller, batch)[0]["feature"]
    alone = []
    for layer in (2, 3):
        one = build(store, signals, student, sections, {"feature": {2: layer}})
        one.projectors.load_state_dict(
            {f"by_pair.2->{layer}.linear.{name}": value
             for name, value in distiller.projectors.by_pair["2->any"].linear.state_dict().items()}
        )  # fmt: skip
        alone.append(stored_terms(one, batch)[0]["feature"])
    torch.testing.assert_close(found, (alone[0] + alone[1]) / 2)


@pytest.mark.parametrize("attention", ["relations", "head_mean"])
def test_composition_and_padding_of_a_batch_change_nothing(attention, captured):
    """Also beside a cosine and a divergence; a transport plan is its batch's own."""
    store = captured("llama")
    signals = [*choose(store), *attention_signals("value")]
    sections = {
        "feature": {"weight": 1.0, "loss": "cosine"},
        "attention": {"weight": 1.0, "loss": attention},
        "output": {"weight": 1.0, "loss": "skew_reverse_kl", "temperature": 2.0},
    }
    student = student_of("llama", None, heads=2, kv_heads=1)
    maps = {"feature": FEATURE_MAP, "attention": PAIRS}
    distiller = build(store, signals, student, sections, maps)
    dataset = StoreDataset(store.pinned(signals), [one.name for one in signals])
    rows = [0, 5, 9, 13, 2]
    whole = dataset.__getitems__(rows)
    counts = term_counts(whole, distiller.objective, task=store.task)
    expected = distiller(whole, counts, apart=True).terms
    parameters = list(distiller.parameters())
    for parts in ([[i] for i in rows], [[13, 5], [2, 0, 9]]):
        batches = [padded(dataset.__getitems__(part), 3) for part in parts]
        pieces = [distiller(batch, counts, apart=True).terms for batch in batches]
        for term, value in expected.items():
            total = torch.stack([piece[term] for piece in pieces]).sum()
            torch.testing.assert_close(total, value, rtol=1e-5, atol=1e-7)
            assert difference(gradients(total, parameters), gradients(value, parameters)) < 1e-4


@pytest.mark.parametrize("loss", ["cosine", "pkd"])
def test_directions_from_the_store_are_those_beside_the_teacher(loss, captured):
    store = captured("llama")
    signals = [one for one in choose(store, "float16") if one.kind == "hidden"]
    batch = ragged_batch(store, signals)
    student = student_of("llama", None)
    section = {"weight": 1.0, "loss": loss}
    distiller = build(store, signals, student, {"feature": section}, {"feature": FEATURE_MAP})
    terms, _ = stored_terms(distiller, batch)
    teacher, twin = store.load_teacher(), eager(student)
    statistics = live.channel_statistics(teacher, train_rows(store), [0, 2, 3])
    with torch.no_grad():
        told = live.outputs(teacher, batch)
    said, keep = live.outputs(twin, batch), batch["attention_mask"].bool()
    losses = []
    for s, t in FEATURE_MAP.items():
        target = (told.hidden[t] - statistics[t][0]) / statistics[t][1]
        ours = distiller.projectors.by_pair[f"{s}->{t}"](said.hidden[s])
        cosine = torch.cosine_similarity(ours[keep], target[keep], dim=-1)
        losses.append((1 - cosine).mean() * (2 if loss == "pkd" else 1))
    same_step(terms["feature"], student, torch.stack(losses).mean(), twin, bound=1e-3)


def output_rows(store: Captured, student: Any, batch: dict) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        told = live.outputs(store.load_teacher(), batch).logits
    said = live.outputs(student, batch).logits
    if store.task != "causal-lm":
        return told, said
    counted = (batch["loss_mask"] & batch["attention_mask"].bool())[:, 1:]
    return told[:, :-1][counted], said[:, :-1][counted]


@pytest.mark.parametrize("form", ["topk", "head-float16"])
@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl"])
def test_divergences_from_the_store_are_those_beside_the_teacher(loss, form, captured):
    store = captured("llama")
    signals = [one for one in choose(store, logits=form) if one.kind == "logits"]
    batch = ragged_batch(store, signals)
    student = student_of("llama", None)
    section = {"weight": 1.0, "loss": loss, "temperature": 2.0, "skew": 0.2}
    distiller = build(store, signals, student, {"output": section}, {})
    terms, _ = stored_terms(distiller, batch)
    twin = eager(student)
    told, said = output_rows(store, twin, batch)
    p, q = (told / 2.0).softmax(-1), (said / 2.0).softmax(-1)
    if form == "topk":
        inside = told.topk(TOPK).indices
        p, q = (side.gather(1, inside) for side in (p, q))
        p, q = (torch.cat([side, 1 - side.sum(-1, keepdim=True)], -1) for side in (p, q))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1).mean()

    wanted = (
        4
        * {
            "reverse_kl": lambda: kl(q, p),
            "jsd": lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
            "tvd": lambda: (p - q).abs().sum(-1).mean() / 2,
            "skew_forward_kl": lambda: kl(p, 0.2 * p + 0.8 * q),
            "skew_reverse_kl": lambda: kl(q, 0.2 * q + 0.8 * p),
        }[loss]()
    )
    same_step(terms["output"], student, wanted, twin, bound=2e-3)


def test_samples_train_towards_the_teacher(captured):
    """The cross-entropy of the stored draws, at positions that count."""
    store, signals = captured("llama"), [signal("logits", None, "sampled", n=32)]
    batch = ragged_batch(store, signals)
    student = student_of("llama", None)
    distiller = build(store, signals, student, {"output": {"weight": 1.0}}, {})
    terms, _ = stored_terms(distiller, batch)
    told, said = output_rows(store, student, batch)
    exact = -(told.softmax(-1) * said.log_softmax(-1)).sum(-1).mean()
    assert terms["output"].item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize(
    ("task", "loss"),
    [("multi-label", "binary_kl"), ("multi-label", "mse"), ("regression", "mse")],
)
def test_outputs_that_are_no_distribution(task, loss, captured):
    store, signals = captured("bert", task), [signal("logits", None, "dense")]
    batch = ragged_batch(store, signals)
    assert batch["labels"].dtype == torch.float32
    student = student_of("bert", task, num_labels=store.reader.plan["outputs"])
    sections = {"output": {"weight": 1.0, "loss": loss}, "labels": {"weight": 1.0}}
    distiller = build(store, signals, student, sections, {})
    terms, _ = stored_terms(distiller, batch)
    twin = eager(student)
    told, said = output_rows(store, twin, batch)
    wanted = (told - said).square().mean()
    if loss == "binary_kl":
        p, q = told.sigmoid(), said.sigmoid()
        each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        wanted = each.mean()
    same_step(terms["output"], student, wanted, twin, bound=1e-4)
    goal = batch["labels"]
    labels = (said - goal).square().mean()
    if task == "multi-label":
        q = said.sigmoid()
        labels = -(goal * q.log() + (1 - goal) * (1 - q).log()).mean()
    same_step(terms["labels"], student, labels, twin, bound=1e-4)


@pytest.mark.parametrize(
    ("section", "signals", "student", "error", "match"),
    [
        ({"attention": {}}, attention_signals("attention"), {"heads": 2, "kv_heads": 1},
         IncompatibleError, r"has 4 attention heads, student layer 1 has 2; use .* relations or "
         "head_mean, give the student 4"),
        ({"attention": {"loss": "relations", "relation_heads": 3}},
         attention_signals("attention", "value"), {}, IncompatibleError,
         r"relation_heads: 3 does not divide the student's query width 16; choose a divisor"),
        ({"output": {"loss": "binary_kl"}}, [signal("logits", None, "head", values="int8")], {},
         ConfigError, r"loss\.output\.loss: binary_kl does not fit the task causal-lm"),
        ({"output": {"loss": "mse"}},
         [signal("logits", None, "topk", k=8, temperatures=(1.0, 2.0))], {},
         IncompatibleError, r"mse cannot be computed from logits/topk-.* capture logits as"),
        ({"output": {"loss": "jsd"}}, [signal("logits", None, "sampled", n=32)], {},
         IncompatibleError, "jsd cannot be computed from logits/sampled-.* forward_kl alone"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(section, signals, student, error, match, captured):
    [(term, options)] = section.items()
    with pytest.raises(error, match=match):
        build(
            captured("llama"), signals, student_of("llama", None, **student),
            {term: {"weight": 1.0, **options}}, {"attention": PAIRS},
        )  # fmt: skip


def test_a_term_without_a_count_is_not_computed(captured):
    store = captured("llama")
    signals = choose(store)
    sections = {t: {"weight": 1.0} for t in ("feature", "attention", "labels")}
    maps = {"feature": FEATURE_MAP, "attention": PAIRS}
    distiller = build(store, signals, student_of("llama", None), sections, maps)
    batch = StoreDataset(store.pinned(signals), [one.name for one in signals]).__getitems__([1, 4])
    batch["features"] = {}  # nothing of the teacher is looked at
    assert list(distiller(batch, {"labels": 5}).terms) == ["labels"]
