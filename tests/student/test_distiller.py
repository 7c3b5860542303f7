"""The central claim: a step from the store equals the step beside the live teacher."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import IncompatibleError
from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.student.align.objective import Objective
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.data.stream import StoreDataset, positions_of
from tests.captured import OPTIONS, Captured, prepared, signal
from tests.student import live
from tests.tiny import tiny_model

TOPK = 8
FEATURE_MAP = {0: 0, 1: 2, 2: 3}
ATTENTION_MAP = {1: 1, 2: 3}
ARCHITECTURES = [
    ("llama", None),
    ("qwen3", None),
    ("gpt2", None),
    ("bert", None),
    ("distilbert", None),
    ("llama", "classification"),
]
# Largest relative L2 difference of a term's gradient from the live teacher's, by what feeds it:
# two to five times what is found, and no more than the form's own stated error.
BOUNDS = {
    "float16": 5e-4,
    "bfloat16": 2e-3,
    "int8": 7e-3,
    "qk": 1e-2,
    "topk": 1e-3,
    "head-int8": 7e-3,
    "head-float16": 5e-4,
    "dense": 3e-6,
    "labels": 3e-6,
}


def objective(**weights: float) -> Objective:
    chosen = {"feature": 1.0, "attention": 1.0, "output": 1.0, "labels": 1.0} | weights
    sections: dict[str, Any] = {term: {"weight": weight} for term, weight in chosen.items()}
    sections["output"]["temperature"] = 2.0
    return Objective.model_validate(sections)


def student_of(kind: str, task: str | None, **options: Any) -> Any:
    sizes = {"layers": 2, "width": 16, "seed": 5}
    no_dropout = {
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    }
    return tiny_model(kind, task=task, **sizes | no_dropout.get(kind, {}) | options)


def choose(captured: Captured, hidden: str = "bfloat16", logits: str | None = None) -> list:
    logits = logits or ("dense" if captured.task == "classification" else "topk")
    options: dict[str, Any] = {}
    if logits == "topk":
        options = {"k": TOPK, "temperatures": (1.0, 2.0)}
    elif logits.startswith("head"):
        logits, options = "head", {"values": logits.removeprefix("head-")}
    return [
        *(signal("hidden", layer, hidden) for layer in FEATURE_MAP.values()),
        *(signal("attention", layer, "qk") for layer in ATTENTION_MAP.values()),
        signal("logits", None, logits, **options),
    ]


def distiller_of(captured: Captured, signals: list, student: Any, goal: Objective) -> Distiller:
    reader = captured.pinned(signals)
    names = [one.name for one in signals]
    features = TeacherFeatures(reader, names, temperature=goal.output.temperature)
    torch.manual_seed(1)
    return Distiller(
        student,
        features,
        goal,
        {"feature": FEATURE_MAP, "attention": ATTENTION_MAP},
        task=captured.task,
    )


def ragged_batch(captured: Captured, signals: list) -> dict[str, Any]:
    """Five examples of two segments, in no particular order."""
    dataset = StoreDataset(captured.pinned(signals), [one.name for one in signals])
    first, second = dataset.segment[0], dataset.segment[-1]
    assert first != second
    ours = [i for i, number in enumerate(dataset.segment) if number == first][:3]
    theirs = [i for i, number in enumerate(dataset.segment) if number == second][:2]
    batch = dataset.__getitems__([theirs[1], ours[2], ours[0], theirs[0], ours[1]])
    lengths = batch["attention_mask"].sum(-1)
    assert lengths.min() < lengths.max()
    return batch


def gradients(term: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def live_terms(captured: Captured, batch: dict, distiller: Distiller, top_k: int | None) -> Any:
    """Terms beside the live teacher, of a twin of the distiller's student; and its parameters."""
    kind = distiller.student.config.model_type
    teacher = captured.load_teacher()
    statistics = live.channel_statistics(
        teacher, train_rows(captured), sorted(set(FEATURE_MAP.values()))
    )
    student = copy.deepcopy(distiller.student)
    student.set_attn_implementation("eager")
    projectors = {
        (s, t): copy.deepcopy(distiller.projectors.by_pair[f"{s}->{t}"].linear)
        for s, t in FEATURE_MAP.items()
    }
    with torch.no_grad():
        told = live.outputs(teacher, batch)
    assert len(told.hidden) == 4, kind
    terms = live.terms(
        told,
        live.outputs(student, batch),
        batch,
        task=captured.task,
        statistics=statistics,
        projectors=projectors,
        attention_pairs=ATTENTION_MAP,
        temperature=2.0,
        top_k=top_k,
    )
    weights = [p for projector in projectors.values() for p in projector.parameters()]
    return terms, [*student.parameters(), *weights]


def train_rows(captured: Captured) -> list[dict[str, Tensor]]:
    reader = captured.reader
    rows = []
    for number in reader.segments("train"):
        segment = reader.read_segment(number)
        for start, length in zip(segment.offset, segment.length, strict=True):
            row = {
                name: torch.from_numpy(values[start : start + length].astype("int64"))[None]
                for name, values in segment.tokens.items()
            }
            rows.append(row | {"attention_mask": torch.ones_like(row["input_ids"])})
    return rows


def stored_terms(distiller: Distiller, batch: dict) -> tuple[dict[str, Tensor], list]:
    counts = term_counts(batch, distiller.objective, task=distiller.task)
    terms = distiller(batch, counts, apart=True).terms
    return terms, [*distiller.student.parameters(), *distiller.projectors.parameters()]


@pytest.mark.parametrize(("kind", "task"), ARCHITECTURES)
def test_a_step_from_the_store_is_the_step_beside_the_teacher(kind, task, captured):
    store = captured(kind, task)
    logits = ["dense"] if store.task == "classification" else ["topk", "head-int8", "head-float16"]
    hidden = ["float16", "bfloat16", "int8"]
    student = student_of(kind, task)
    for i in range(3):
        form, out = hidden[i], logits[i % len(logits)]
        signals = choose(store, form, out)
        batch = ragged_batch(store, signals)
        distiller = distiller_of(store, signals, student, objective())
        ours, our_parameters = stored_terms(distiller, batch)
        theirs, their_parameters = live_terms(
            store, batch, distiller, TOPK if out == "topk" else None
        )
        assert list(ours) == ["feature", "attention", "output", "labels"]
        fed_by = {"feature": form, "attention": "qk", "output": out, "labels": "labels"}
        for term, source in fed_by.items():
            bound = BOUNDS[source]
            torch.testing.assert_close(ours[term], theirs[term], rtol=bound, atol=0)
            found = gradients(ours[term], our_parameters)
            wanted = gradients(theirs[term], their_parameters)
            assert difference(found, wanted) < bound, (term, source)


def test_features_of_swapped_rows_fail_the_comparison(captured):
    store = captured("llama")
    signals = choose(store, "bfloat16", "head-float16")
    batch = ragged_batch(store, signals)
    distiller = distiller_of(store, signals, student_of("llama", None), objective())
    theirs, their_parameters = live_terms(store, batch, distiller, None)
    lengths = batch["attention_mask"].sum(-1).tolist()
    order = [1, 0, *range(2, len(lengths))]
    for parts in batch["features"].values():
        for part, values in parts.items():
            pieces = values.split(lengths)
            parts[part] = torch.cat([pieces[i] for i in order])
    ours, our_parameters = stored_terms(distiller, batch)
    for term, source in (("feature", "bfloat16"), ("attention", "qk"), ("output", "head-float16")):
        found = gradients(ours[term], our_parameters)
        wanted = gradients(theirs[term], their_parameters)
        assert difference(found, wanted) > 4 * BOUNDS[source], term
    torch.testing.assert_close(ours["labels"], theirs["labels"])


def test_what_is_captured_in_its_own_precision_is_bit_for_bit_the_teachers(tmp_path):
    """A bfloat16 teacher in bfloat16 forms loses nothing when the batch is the same."""
    options = replace(OPTIONS, dtype="bfloat16", segment_tokens=80, batch_tokens=10_000)
    store = prepared(tmp_path, "llama", options=options)
    signals = [
        *(signal("hidden", layer, "bfloat16") for layer in (0, 2, 3)),
        signal("logits", None, "head", values="bfloat16"),
    ]
    store.capture(signals)
    teacher = store.load_teacher(attention="sdpa", dtype=torch.bfloat16)
    reader = store.pinned(signals)
    features = TeacherFeatures(reader, [one.name for one in signals])
    dataset = StoreDataset(reader, [one.name for one in signals])
    for number in reader.segments("train"):
        members = np.flatnonzero(dataset.segment == number)
        longest_first = members[np.argsort(-dataset.length[members], kind="stable")]
        batch = dataset.__getitems__(longest_first.tolist())
        keep = batch["attention_mask"].bool()
        with torch.inference_mode():
            inputs = {"input_ids": batch["input_ids"], "use_cache": False}
            told = live.outputs_of(teacher, inputs)
            normed = teacher.model.norm(told.hidden[3])
        for layer in (0, 2, 3):
            stored = features._decode("hidden", layer, batch)["hidden"]
            assert torch.equal(stored, told.hidden[layer][keep].float())
        head_input = features._decode("logits", None, batch)["head_input"]
        assert torch.equal(head_input, normed[keep].float())


@pytest.mark.parametrize(("kind", "logits"), [("llama", "head-int8"), ("bert", "dense")])
def test_terms_apart_and_together_make_the_same_step(kind, logits, captured):
    """The sum is weighted alike, one term's factor on the device and another's 0."""
    store = captured(kind)
    signals = choose(store, logits=logits)
    batch = ragged_batch(store, signals)
    distiller = distiller_of(store, signals, student_of(kind, None), objective())
    counts = term_counts(batch, distiller.objective, task=store.task)
    factors = {"feature": 0.0, "attention": 0.5, "output": torch.tensor(0.25), "labels": 2.0}
    together, apart = (distiller(batch, counts, factors, apart=one) for one in (False, True))
    parameters = list(distiller.parameters())
    torch.testing.assert_close(together.terms, apart.terms)
    torch.testing.assert_close(together.total, apart.total)
    found = gradients(together.total, parameters)
    assert difference(gradients(apart.total, parameters), found) < 1e-5
    weighted = sum(factors[t] * gradients(v, parameters) for t, v in apart.terms.items())
    assert difference(weighted, found) < 1e-5


@pytest.mark.parametrize(("kind", "task"), [("llama", None), ("gpt2", None), ("bert", None)])
def test_composition_order_and_padding_of_a_batch_change_nothing(kind, task, captured):
    """Rows alone, in another order, or padded further: the sums over counts are the same."""
    store = captured(kind, task)
    signals = choose(store)
    distiller = distiller_of(store, signals, student_of(kind, task), objective())
    dataset = StoreDataset(store.pinned(signals), [one.name for one in signals])
    rows = [0, 5, 9, 13, 2]
    whole = dataset.__getitems__(rows)
    counts = term_counts(whole, distiller.objective, task=store.task)
    expected = distiller(whole, counts, apart=True).terms
    parameters = list(distiller.parameters())
    wanted = {term: gradients(value, parameters) for term, value in expected.items()}
    for parts in ([[i] for i in rows], [[13, 5], [2, 0, 9]]):
        batches = [padded(dataset.__getitems__(part), 3) for part in parts]
        per_part = [term_counts(batch, distiller.objective, task=store.task) for batch in batches]
        assert counts == {term: sum(found[term] for found in per_part) for term in counts}
        pieces = [distiller(batch, counts, apart=True).terms for batch in batches]
        for term in counts:
            total = torch.stack([piece[term] for piece in pieces]).sum()
            torch.testing.assert_close(total, expected[term], rtol=1e-5, atol=1e-7)
            assert difference(gradients(total, parameters), wanted[term]) < 1e-5, term


def padded(batch: dict, more: int) -> dict:
    """Pad a batch further, with other ids than the padding id."""
    found = dict(batch)
    for name in ("input_ids", "attention_mask", "loss_mask", "token_type_ids"):
        if name in batch:
            filler = {"input_ids": 7, "loss_mask": True}.get(name, 0)
            found[name] = torch.nn.functional.pad(batch[name], (0, more), value=filler)
    return with_positions(found)


def with_positions(batch: dict[str, Any]) -> dict[str, Any]:
    """The positions of a batch whose masks were changed."""
    mask = batch["loss_mask"].numpy() if "loss_mask" in batch else None
    found = positions_of(batch["attention_mask"].bool().numpy(), mask)
    return batch | {"positions": {name: torch.from_numpy(found[name]) for name in found}}


def test_gradient_checkpointing_changes_no_bit(captured):
    store = captured("llama")
    signals = choose(store)
    batch = ragged_batch(store, signals)
    student = student_of("llama", None).train()
    distiller = distiller_of(store, signals, student, objective())
    plain, parameters = stored_terms(distiller, batch)
    wanted = [gradients(value, parameters) for value in plain.values()]
    student.activation_checkpointing_enable({"use_reentrant": False})
    assert student.is_activation_checkpointing
    ours, parameters = stored_terms(distiller, batch)
    for term, value, other in zip(ours, ours.values(), wanted, strict=True):
        assert torch.equal(value, plain[term])
        assert torch.equal(gradients(value, parameters), other), term


@pytest.mark.parametrize("logits", ["topk", "head-int8"])
def test_a_batch_without_any_target_is_zero_never_nan(logits, captured):
    store = captured("llama")
    signals = choose(store, logits=logits)
    batch = ragged_batch(store, signals)
    batch = with_positions(batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])})
    assert not len(batch["positions"]["targets"])
    distiller = distiller_of(store, signals, student_of("llama", None), objective())
    terms, parameters = stored_terms(distiller, batch)
    for term in ("output", "labels"):
        assert terms[term] == 0
        assert not gradients(terms[term], parameters).any()
    assert gradients(torch.stack(list(terms.values())).sum(), parameters).isfinite().all()


def test_a_position_counts_iff_its_target_does(captured):
    """The loss mask belongs to targets: it is shifted with the labels, and a row's last token has
    none."""
    store = captured("llama")
    signals = choose(store, logits="head-float16")
    batch = ragged_batch(store, signals)
    distiller = distiller_of(
        store, signals, student_of("llama", None), objective(feature=0.0, attention=0.0)
    )
    row, target = 1, 4
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    batch["loss_mask"][row, target] = True
    batch = with_positions(batch)
    counts = term_counts(batch, distiller.objective, task="causal-lm")
    assert counts == {"output": 1, "labels": 1}
    terms, _ = stored_terms(distiller, batch)
    logits = distiller.student(batch["input_ids"][row : row + 1]).logits[0, target - 1]
    expected = -logits.log_softmax(-1)[batch["input_ids"][row, target]]
    torch.testing.assert_close(terms["labels"], expected)
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    batch["loss_mask"][:, 0] = True  # nothing stands before a first token that could predict it
    batch = with_positions(batch)
    assert term_counts(batch, distiller.objective, task="causal-lm")["labels"] == 0


def test_the_first_token_is_left_out_of_features_on_request(captured):
    store = captured("llama")
    signals = choose(store)
    batch = ragged_batch(store, signals)
    goal = Objective.model_validate({"feature": {"weight": 1.0, "skip_first_token": True}})
    distiller = distiller_of(store, signals, student_of("llama", None), goal)
    counts = term_counts(batch, goal, task="causal-lm")
    assert counts == {"feature": int(batch["attention_mask"].sum()) - len(batch["input_ids"])}
    before = distiller(batch, counts).terms["feature"]
    lengths = batch["attention_mask"].sum(-1)
    firsts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
    for name, parts in batch["features"].items():
        if name.startswith("hidden"):
            parts["values_bits"].view(torch.int16)[firsts] = 0
    assert torch.equal(distiller(batch, counts).terms["feature"], before)


def test_a_term_that_is_off_costs_and_needs_nothing(captured):
    store = captured("llama")
    signals = [signal("logits", None, "topk", k=TOPK, temperatures=(1.0, 2.0))]
    goal = objective(feature=0.0, attention=0.0)
    distiller = distiller_of(store, signals, student_of("llama", None), goal)
    assert not list(distiller.projectors.parameters())
    dataset = StoreDataset(store.pinned(signals), [signals[0].name])
    terms, _ = stored_terms(distiller, dataset.__getitems__([1, 4]))
    assert list(terms) == ["output", "labels"]
    assert terms["output"] > 0


def test_nothing_of_the_teacher_is_trained_or_saved(captured):
    store = captured("llama")
    signals = choose(store, "int8", "head-int8")
    distiller = distiller_of(store, signals, student_of("llama", None), objective())
    assert {name.partition(".")[0] for name in distiller.state_dict()} == {"student", "projectors"}
    assert not list(distiller.features.parameters())
    assert distiller.features.head_weight.shape == (64, 32)


def test_a_student_of_a_teacher_with_segments_may_know_none(captured):
    """DistilBERT takes no token_type_ids; the rows of its BERT teacher have them."""
    store = captured("bert")
    signals = choose(store)
    batch = ragged_batch(store, signals)
    assert "token_type_ids" in batch
    distiller = distiller_of(store, signals, student_of("distilbert", None), objective())
    terms, _ = stored_terms(distiller, batch)
    assert all(value.isfinite() for value in terms.values())


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("llama", {"heads": 2, "kv_heads": 1}, r"teacher layer 1 has 4 .* student layer 1 has 2"),
        ("llama", {"vocab": 60}, r"the teacher has 64 outputs, the student 60"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_with_both_values(kind, options, match, captured):
    store = captured(kind)
    with pytest.raises(IncompatibleError, match=match):
        distiller_of(store, choose(store), student_of(kind, None, **options), objective())


def test_a_bidirectional_student_of_a_causal_teacher_is_refused(captured):
    store = captured("llama", "classification")
    with pytest.raises(IncompatibleError, match="teacher layer 1 is causal, the student is not"):
        distiller_of(store, choose(store), student_of("bert", None), objective())
