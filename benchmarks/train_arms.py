"""What a benchmark of training compares: one and the same step, fed in different ways.

Every arm has the same student, loss, optimiser and batches in the same order; only where a batch
comes from differs.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cold import drop
from benchmarks.rivals import RIVALS, Plain
from benchmarks.turns import cpu_seconds
from pipeline.store.reader import StoreReader
from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.student.align.objective import Objective
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.data.feed import Feed
from pipeline.student.data.stream import StoreDataset
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.tap import tap
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.reference import TeacherReference

Given = tuple[dict[str, Any], dict[str, int]]
"""A batch on the device, and the units of each term."""
OBJECTIVE = Objective.model_validate(
    {term: {"weight": 1.0} for term in ("feature", "attention", "output", "labels")}
)
CHECKED_BATCHES = 3
FED = ("store", "ram", "reading")
"""Arms whose batches hold what is stored; those of the others are decoded already."""
WITHOUT_STEP = ("teacher", "reading")
"""Arms that only make their batches."""


@dataclass(frozen=True)
class Setting:
    """What all arms share: the files below `root`, and the sizes of student and batches.

    `maps` is student layer to teacher layer, from 0, the embeddings.
    """

    root: str
    device: str
    maps: Mapping[str, int]
    width: int
    batch_size: int
    pool_segments: int
    workers: int

    @property
    def store(self) -> Path:
        """The one store."""
        (found,) = (path for path in Path(self.root, "stores").iterdir() if path.is_dir())
        return found


class Plan:
    """Which examples run together: the whole batches of the order that training has.

    Args:
        reader: The store.
        setting: What all arms share.
        repeats: Whether the epoch is run again and again: then its first segments come next.
    """

    def __init__(self, reader: StoreReader, setting: Setting, *, repeats: bool = True) -> None:
        self.dataset = StoreDataset(
            reader, list(reader.signals), pool_segments=setting.pool_segments
        )
        order = BatchOrder(
            self.dataset.segment,
            self.dataset.length,
            batch_size=setting.batch_size,
            pool_segments=setting.pool_segments,
            seed=0,
        )
        table = order.timetable()
        self.dataset.follow(table, table.segments[: table.together].tolist() if repeats else ())
        self.batches = [members for members in order if len(members) == setting.batch_size]
        self.tokens = sum(int(self.dataset.length[members].sum()) for members in self.batches)


class Widened(TeacherFeatures):
    """Features that come as plain floats, as of a live teacher or a file of float16."""

    def _decode(
        self,
        kind: str,
        layer: int | None,
        batch: Mapping[str, Any],
        rows: slice | Tensor = slice(None),
    ) -> dict[str, Tensor]:
        name = self.declaration(kind, layer).name
        return {part: value[rows].float() for part, value in batch["features"][name].items()}

    def hidden(
        self,
        layer: int,
        batch: Mapping[str, Any],
        rows: slice | Tensor = slice(None),
    ) -> Tensor:
        """Return rows of a layer's hidden states in units of each channel's deviation."""
        channels = self._channels(self.declaration("hidden", layer))
        assert channels is not None
        return channels.standardise(self._decode("hidden", layer, batch, rows)["hidden"])


class Arm:
    """A student, its step, and the batches of an epoch from one source."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._name, self._setting = name, setting
        self._root, self._device = Path(setting.root), torch.device(setting.device)
        self._reader = StoreReader(setting.store)
        self._plan = Plan(self._reader, setting)
        self._count = partial(term_counts, objective=OBJECTIVE, task="causal-lm")
        self._feed = Feed(self._plan.dataset, self._device, self._count)
        self._distiller = self._build()
        self._trained = [p for p in self._distiller.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4)
        self._directory = self._root / name
        self._rival = self._build_rival() if name in RIVALS else None
        self._epoch: Callable[[], Iterator[Given]] = (
            self._by_hand if self._rival else getattr(self, f"_{name}")()
        )

    def _build(self) -> Distiller:
        teacher = self._reader.teacher_config()
        torch.manual_seed(0)
        layers = {int(student): number for student, number in self._setting.maps.items()}
        student = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=teacher["vocab_size"],
                hidden_size=self._setting.width,
                intermediate_size=3 * self._setting.width,
                num_hidden_layers=max(layers),
                num_attention_heads=teacher["num_attention_heads"],
                num_key_value_heads=teacher["num_attention_heads"],
                max_position_embeddings=teacher["max_position_embeddings"],
                tie_word_embeddings=True,
            )
        )
        kind = TeacherFeatures if self._name in FED else Widened
        maps = {"feature": layers, "attention": {s: t for s, t in layers.items() if s}}
        features = kind(self._reader, list(self._reader.signals))
        distiller = Distiller(student, features, OBJECTIVE, maps, task="causal-lm")
        return distiller.to(self._device)

    def _store(self) -> Callable[[], Iterator[Given]]:
        """Read the store as training does, from the first batch's wish on."""
        return self._fed

    def _reading(self) -> Callable[[], Iterator[Given]]:
        """Read as in `store`; no step follows, so nothing of it is hidden behind one."""
        return self._store()

    def _fed(self) -> Iterator[Given]:
        order = iter(self._plan.batches)
        while found := self._feed.take(order, 1):
            [fed] = found
            yield fed.pieces[0], fed.counts
            self._reader.check_pins()  # as training does after a step

    def _ram(self) -> Callable[[], Iterator[Given]]:
        """Hold all batches, as the store gives them, on the device before the clock starts."""
        held = list(self._fed())
        return lambda: iter(held)

    def _build_rival(self) -> Plain:
        return RIVALS[self._name](
            self._plan.dataset,
            self._reader.plan["pad_id"],
            self._plan.batches,
            workers=self._setting.workers,
            pin=self._device.type == "cuda",
        )

    def _by_hand(self) -> Iterator[Given]:
        assert self._rival is not None
        for batch in self._rival.read(self._directory):
            counts = self._count(batch)
            yield moved(batch, self._device), counts

    def _live(self) -> Callable[[], Iterator[Given]]:
        """Run the teacher, tapped, on each batch: nothing is stored, tokens are in memory."""
        path = self._root / "teacher"
        reference = TeacherReference.load(path)
        teacher = load_teacher(
            path, reference, task="causal-lm", device=self._device, dtype=torch.float32
        )
        names = {
            (one.kind, one.layer): name
            for name in self._reader.signals
            for one in [self._reader.signal(name).declaration]
        }
        layers = {
            kind: [layer for found, layer in names if found == kind and layer is not None]
            for kind in ("hidden", "attention")
        }
        bare = StoreDataset(self._reader, [])
        tokens = [bare.__getitems__(members) for members in self._plan.batches]

        def epoch() -> Iterator[Given]:
            for batch in tokens:
                counts = self._count(batch)
                here = moved(batch, self._device)
                live = here["attention_mask"].bool()
                inputs = model_inputs(model_columns(teacher, here), is_causal=True)
                with torch.no_grad(), tap(teacher, head=True, **layers) as record:
                    run_base(teacher, inputs)
                assert record.head_input is not None
                found = {names["logits", None]: {"head_input": record.head_input[live]}}
                for layer in layers["hidden"]:
                    found[names["hidden", layer]] = {"hidden": record.hidden[layer][live]}
                for layer in layers["attention"]:
                    found[names["attention", layer]] = {
                        "query": record.query[layer].transpose(1, 2)[live],
                        "key": record.key[layer].transpose(1, 2)[live],
                    }
                yield here | {"features": found}, counts

        return epoch

    def _teacher(self) -> Callable[[], Iterator[Given]]:
        """Run the teacher as in `live`; no step follows."""
        return self._live()

    def ask(self, order: str) -> dict[str, Any]:
        """Do what the parent asks: `lap`, `cold`, a lap without the page cache, or `check`.

        `check` may name the batches, by the digests of their rows, that are looked into.
        """
        if order.startswith("check"):
            return self._check(order.split()[1:])
        share = self._forget() if order == "cold" else None
        clock, cpu = time.perf_counter(), cpu_seconds()
        if order == "cold" and self._name == "store":
            self._open_anew()
        for batch, counts in self._epoch():
            if self._name not in WITHOUT_STEP:
                self._step(batch, counts)
        # What is read ahead for the next lap is of this one: the next arm's would pay for it.
        wait(self._plan.dataset._held.values())
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        found = {"seconds": time.perf_counter() - clock, "cpu_seconds": cpu_seconds() - cpu}
        return found if share is None else found | {"resident_share": share}

    def close(self) -> None:
        """End threads and the workers of a rival."""
        self._feed.close()
        if self._rival is not None:
            self._rival.close()

    def _forget(self) -> float:
        """Let go of files, and of their pages in the cache; return the share that stayed."""
        self.close()
        return drop(self._files())

    def _open_anew(self) -> None:
        """Begin as the next run would, which verifies every file of the store at its first use.

        A `DataLoader` starts its workers in the lap, too.
        """
        self._reader = StoreReader(self._setting.store)
        self._plan = Plan(self._reader, self._setting, repeats=False)
        self._feed = Feed(self._plan.dataset, self._device, self._count)

    def _step(self, batch: dict[str, Any], counts: dict[str, int]) -> None:
        self._distiller(batch, counts).total.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _files(self) -> list[Path]:
        # Assets, such as the teacher's head, are loaded once, before the first lap.
        features = self._setting.store / "features.zarr"
        where = {"store": features, **dict.fromkeys(RIVALS, self._directory)}
        found = where.get(self._name)
        return [] if found is None else sorted(p for p in found.rglob("*") if p.is_file())

    @torch.no_grad()
    def _check(self, wanted: list[str]) -> dict[str, Any]:
        """Return which batches come, and the terms of those wanted, by default the first.

        Their features are decoded and written beside, as `check-NAME.safetensors`.
        """
        rows, terms = [], {}
        kept: dict[str, Tensor] = {}
        for batch, counts in self._epoch():
            rows.append(sha256(batch["input_ids"].cpu().numpy().tobytes()).hexdigest()[:16])
            if rows[-1] not in (wanted or rows[:CHECKED_BATCHES]):
                continue
            losses = self._distiller(batch, counts)
            terms[rows[-1]] = {term: float(value) for term, value in losses.terms.items()}
            for name in self._reader.signals:
                one = self._reader.signal(name).declaration
                decoded = self._distiller.features._decode(one.kind, one.layer, batch)
                for part, value in decoded.items():
                    kept[f"{rows[-1]} {name} {part}"] = value.cpu().contiguous()
        save_file(kept, self._root / f"check-{self._name}.safetensors")
        return {"rows": rows, "terms": terms}


def moved(value: Any, device: torch.device) -> Any:
    """Return a batch on the device."""
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    return value.to(device, non_blocking=True)
