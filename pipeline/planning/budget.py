"""What to give up when not all fits: the least, by a stated order of what a student misses least.

Each kind of signal has a ladder of rungs, from what is asked for downwards; a rung has a penalty
and a size. The choice is the combination of least penalty among those that fit, so a larger budget
never loses fidelity. Nothing is added to what is asked for. Penalties order what was measured
elsewhere: narrower numbers cost a student next to nothing, fewer ids of the output a little, layers
that no student is aligned with less than a whole kind, and what a student needs the most.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.errors import IncompatibleError, ResourceError
from pipeline.store.forms.form import Form, options
from pipeline.store.forms.registry import FORMS, build_form
from pipeline.store.signals import Signal

NARROWER: dict[tuple[str, str], tuple[tuple[str, float], ...]] = {
    ("hidden", "float16"): (("bfloat16", 0.5), ("int8", 1.0), ("int4", 3.0)),
    ("hidden", "bfloat16"): (("int8", 1.0), ("int4", 3.0)),
    ("hidden", "int8"): (("int4", 2.0),),
    ("attention", "qk"): (("below", 0.5),),
}
"""Forms that say the same in fewer bytes, and what they cost: `int8` errs by 0.7% of a state,
`int4` by 9%, which a student averages out."""
COARSE = frozenset({"int4"})
"""Forms of hidden states that attention rebuilt from them would no longer be faithful to."""
HEAD_VALUES: dict[str, tuple[tuple[str, float], ...]] = {
    "float16": (("bfloat16", 0.25), ("int8", 0.5)),
    "bfloat16": (("int8", 0.5),),
    "int8": (),
}
CONDITIONAL = COARSE | {"below"}
"""Forms that not every combination allows."""
TOPK = ((256, 3.0), (128, 4.0), (64, 5.0), (32, 7.0), (16, 9.0))
"""Ids kept: with 64 a student's loss was 1.9% higher, with 16 6.7% (docs/forms.md)."""
SAMPLED = ((64, 3.5), (32, 6.0), (16, 8.0))
"""Draws: right in the mean, the noisier the fewer; with 64 a student's loss was 0.05% higher."""
THINNED = {"hidden": 10.0, "attention": 8.0, "value": 8.0}
"""Penalty of layers that no student needs, all of them together."""
NO_KIND = {"hidden": 14.0, "attention": 11.0, "value": 10.0, "logits": 40.0}
"""Penalty of a kind left out altogether, which no student needs."""
BROKEN = 100.0
"""Penalty of each student that could no longer be trained as `params.yaml` says."""


@dataclass(frozen=True)
class Request:
    """Layers of a kind in a form, as one entry of the capture section; no layers of logits."""

    kind: str
    form: Form
    layers: tuple[int, ...] = ()

    def signals(self) -> list[Signal]:
        """Return the signals that answer it."""
        if self.kind == "logits":
            return [Signal(self.form, None)]
        return [Signal(self.form, layer) for layer in self.layers]


@dataclass(frozen=True)
class Needs:
    """What a student asks of a store: its layers by kind, and forms that it names itself.

    `temperature` is that of its output term, None where that is off.
    """

    student: str
    layers: Mapping[str, frozenset[int]] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    temperature: float | None = None


@dataclass(frozen=True)
class Rung:
    """One way to capture one kind: its requests, what they cost in fidelity, and in words."""

    requests: tuple[Request, ...]
    penalty: float
    words: str = ""
    broken: frozenset[str] = frozenset()

    @cached_property
    def layers(self) -> frozenset[int]:
        """Its layers."""
        return frozenset(layer for request in self.requests for layer in request.layers)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of its forms."""
        return frozenset(request.form.name for request in self.requests)

    @cached_property
    def provides(self) -> frozenset[int]:
        """Layers of hidden states that attention may be rebuilt from."""
        fine = [r for r in self.requests if r.kind == "hidden" and r.form.name not in COARSE]
        return frozenset(layer for request in fine for layer in request.layers)

    @cached_property
    def requires(self) -> frozenset[int]:
        """Layers of hidden states that its attention is rebuilt from."""
        below = [request for request in self.requests if request.form.name == "below"]
        return frozenset(layer - 1 for request in below for layer in request.layers)

    def signals(self) -> list[Signal]:
        """Return its signals."""
        return [signal for request in self.requests for signal in request.signals()]


@dataclass(frozen=True)
class Choice:
    """The best that fits: a rung a kind, bytes in all, and the students that it breaks."""

    rungs: Mapping[str, Rung]
    bytes: int
    penalty: float
    broken: tuple[str, ...]

    @property
    def given_up(self) -> list[str]:
        """Return in words what was given up, kind by kind; nothing if all fits."""
        return [rung.words for rung in self.rungs.values() if rung.words]

    def signals(self) -> list[Signal]:
        """Return the signals to capture."""
        return [signal for rung in self.rungs.values() for signal in rung.signals()]


def choose(
    asked: Mapping[str, Sequence[Request]],
    budget: int,
    *,
    size: Callable[[Sequence[Signal]], int],
    fixed: int,
    needs: Sequence[Needs],
    accepts: Callable[[Form], frozenset[str]],
) -> Choice:
    """Return the combination of least penalty that fits, the smaller of equals.

    Args:
        asked: What the capture section asks for, by kind.
        budget: Bytes that the store may take.
        size: Bytes that some signals of one kind take, what is stored once for them included.
        fixed: Bytes of what does not depend on the signals.
        needs: What each student asks for.
        accepts: The students that could not use a form of the logits.

    Raises:
        ResourceError: If not even the smallest fits, with its size.
    """
    ladders = {kind: ladder(kind, asked[kind], needs, accepts) for kind in asked if asked[kind]}
    sizes: dict[tuple[str, int], int] = {}
    for kind, rungs in ladders.items():
        for place, rung in enumerate(rungs):
            with suppress(IncompatibleError):  # more ids than this teacher's vocabulary has
                sizes[kind, place] = size(rung.signals())
    best: tuple[float, int, tuple[Rung, ...]] | None = None
    smallest: int | None = None
    kept = {kind: _worth_it(rungs, kind, sizes) for kind, rungs in ladders.items()}
    for places in itertools.product(*kept.values()):
        found = fixed + sum(sizes[kind, p] for kind, p in zip(kept, places, strict=True))
        if found > budget and smallest is not None and found >= smallest:
            continue
        chosen = tuple(ladders[kind][p] for kind, p in zip(kept, places, strict=True))
        if not _stands(chosen):
            continue
        smallest = found if smallest is None else min(smallest, found)
        if found <= budget:
            broken = frozenset().union(*(rung.broken for rung in chosen))
            penalty = sum(rung.penalty for rung in chosen) + BROKEN * len(broken)
            if best is None or (penalty, found) < best[:2]:
                best = penalty, found, chosen
    if best is None:
        raise ResourceError(
            f"budget {budget:,} bytes: the least that can be captured takes up to "
            f"{smallest or fixed:,}; give more, a smaller capture.fraction, or ask for less"
        )
    penalty, found, chosen = best
    broken = frozenset().union(*(rung.broken for rung in chosen))
    return Choice(dict(zip(kept, chosen, strict=True)), found, penalty, tuple(sorted(broken)))


def _worth_it(rungs: Sequence[Rung], kind: str, sizes: Mapping[tuple[str, int], int]) -> list[int]:
    """Leave out rungs that another one beats in bytes, penalty, layers and students alike."""

    def beats(one: int, other: int) -> bool:
        a, b = rungs[one], rungs[other]
        mine = (a.penalty, sizes[kind, one])
        theirs = (b.penalty, sizes[kind, other])
        return (
            mine != theirs
            and all(x <= y for x, y in zip(mine, theirs, strict=True))
            and a.broken <= b.broken
            and a.layers >= b.layers
            and not (a.names & CONDITIONAL and not b.names & CONDITIONAL)
        )

    places = [place for place in range(len(rungs)) if (kind, place) in sizes]
    return [p for p in places if not any(beats(other, p) for other in places if other != p)]


def _stands(rungs: Sequence[Rung]) -> bool:
    """Tell whether anything is captured, and all that attention is rebuilt from."""
    if not any(rung.requests for rung in rungs):
        return False
    required = frozenset().union(*(rung.requires for rung in rungs))
    return not required or required <= frozenset().union(*(rung.provides for rung in rungs))


def ladder(
    kind: str,
    asked: Sequence[Request],
    needs: Sequence[Needs],
    accepts: Callable[[Form], frozenset[str]],
) -> list[Rung]:
    """Return the rungs of a kind: what is asked for first, nothing of the kind last."""
    if kind == "logits":
        return _logits(asked[0], needs, accepts)
    everything = sorted({layer for request in asked for layer in request.layers})
    rungs = []
    for form, cost in _forms(kind, asked):
        changed = [
            request if form is None else Request(kind, form, request.layers) for request in asked
        ]
        for kept in _thinned(everything, needs, kind):
            requests = tuple(
                Request(kind, r.form, tuple(layer for layer in r.layers if layer in kept))
                for r in changed
            )
            requests = tuple(r for r in requests if r.layers)
            dropped = 1 - len(kept) / len(everything)
            words = _words(kind, asked, form, everything, kept)
            penalty = cost + THINNED.get(kind, 10.0) * dropped
            rungs.append(Rung(requests, penalty, words, _broken(kind, kept, form, needs)))
    users = frozenset(one.student for one in needs if one.layers.get(kind))
    rungs.append(Rung((), NO_KIND[kind], f"{kind}: left out", users))
    return rungs


def _forms(kind: str, asked: Sequence[Request]) -> list[tuple[Form | None, float]]:
    """Return the forms that all requests of a kind may be given instead; None leaves them."""
    found: list[tuple[Form | None, float]] = [(None, 0.0)]
    if len({request.form.name for request in asked}) == 1:
        for name, cost in NARROWER.get((kind, asked[0].form.name), ()):
            if f"{kind}.{name}" in FORMS:
                found.append((build_form(kind, name, {}), cost))
    return found


def _thinned(layers: Sequence[int], needs: Sequence[Needs], kind: str) -> list[frozenset[int]]:
    """Return ever fewer of some layers: those in use first, the rest evenly, first and last kept.

    Below those that students need, they are thinned all alike.
    """
    used = frozenset().union(*(one.layers.get(kind, frozenset()) for one in needs)) & set(layers)
    free = [layer for layer in layers if layer not in used]
    found = [used | _evenly(free, count) for count in range(len(free), -1, -1)]
    found += [_evenly(sorted(used), count) for count in range(len(used) - 1, 0, -1)]
    return [one for one in dict.fromkeys(found) if one]


def _evenly(layers: Sequence[int], count: int) -> frozenset[int]:
    """Return so many of some layers, evenly spread; of one, the last."""
    if count <= 0:
        return frozenset()
    if count == 1:
        return frozenset(layers[-1:])
    step = (len(layers) - 1) / (count - 1)
    return frozenset(layers[round(step * place)] for place in range(count))


def _broken(
    kind: str, kept: frozenset[int], form: Form | None, needs: Sequence[Needs]
) -> frozenset[str]:
    return frozenset(
        one.student
        for one in needs
        if one.layers.get(kind)
        and (
            not one.layers[kind] <= kept
            or (form is not None and one.forms.get(kind) not in (None, form.name))
        )
    )


def _words(
    kind: str,
    asked: Sequence[Request],
    form: Form | None,
    layers: Sequence[int],
    kept: frozenset[int],
) -> str:
    said = []
    if form is not None:
        said.append(f"{asked[0].form.name} to {form.name}")
    if len(kept) < len(layers):
        gone = ", ".join(str(layer) for layer in layers if layer not in kept)
        said.append(f"without layers {gone}")
    return f"{kind}: {'; '.join(said)}" if said else ""


def _logits(
    asked: Request, needs: Sequence[Needs], accepts: Callable[[Form], frozenset[str]]
) -> list[Rung]:
    """Return what the output may be kept as; what no language model has is kept or left out."""
    form, given = asked.form, options(asked.form)
    rungs = [Rung((asked,), 0.0, "", accepts(form))]

    def add(name: str, values: Mapping[str, Any], penalty: float) -> None:
        other = build_form("logits", name, dict(values))
        shown = ", ".join(
            f"{key} {value}" for key, value in values.items() if key != "temperatures"
        )
        words = f"logits: {form.name} to {name}{f' ({shown})' if shown else ''}"
        rungs.append(Rung((Request("logits", other),), penalty, words, accepts(other)))

    if form.name == "head":
        for values, cost in HEAD_VALUES.get(str(given.get("values")), ()):
            add("head", {"values": values}, cost)
    if form.name in ("head", "topk"):
        used = sorted({one.temperature for one in needs if one.temperature is not None})
        temperatures = given.get("temperatures") or used or [1.0]
        base = next((cost for k, cost in TOPK if k <= given.get("k", 2**30)), TOPK[-1][1])
        for k, cost in TOPK:
            if form.name == "head" or k < given["k"]:
                # As far below what is asked for as it is below the head.
                penalty = cost if form.name == "head" else cost - min(base, cost) + 0.5
                add("topk", {"k": k, "temperatures": temperatures}, penalty)
    if form.name in ("head", "topk", "sampled"):
        for n, cost in SAMPLED:
            if form.name != "sampled" or n < given["n"]:
                add("sampled", {"n": n}, cost)
    users = frozenset(one.student for one in needs if one.temperature is not None)
    rungs.append(Rung((), NO_KIND["logits"], "logits: left out", users))
    return rungs
