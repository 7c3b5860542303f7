"""What a model costs: parameters, bytes on disk, tokens a second, seconds a sequence.

Times are medians after a warm-up and hold for the device, threads, batch and length they state;
compare them only where those agree.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError

# Hub snapshots often hold the same weights in several formats; only safetensors is what we load.
OTHER_WEIGHTS = frozenset({".bin", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".gguf"})


SECONDS = 10.0
"""Of timing a full batch, and of timing a sequence, unless one pass takes longer."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Speed of a forward pass, and what it was measured with.

    Attributes:
        tokens_per_second: Tokens of a full batch over the median time of its forward pass.
        latency_seconds: Median time of the forward pass of one sequence.
        batch: Sequences in the full batch.
        length: Tokens of every sequence.
        repeats: Timed passes of the full batch; fewer than requested if time ran out.
        slowest: Tokens per second of the slowest pass.
        fastest: Tokens per second of the fastest pass.
        threads: CPU threads torch may use within an operation.
        device: Kind of device, for example cpu or cuda.
    """

    tokens_per_second: float
    latency_seconds: float
    batch: int
    length: int
    repeats: int
    slowest: float
    fastest: float
    threads: int
    device: str


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Count parameters, with and without embeddings.

    A tensor used twice counts once. Embeddings are every lookup table (tokens, positions, token
    types) and an output head with one row per vocabulary entry, tied or not, with its bias.
    """
    everything = {id(parameter): parameter.numel() for parameter in model.parameters()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    vocab = getattr(model.config.get_text_config(), "vocab_size", None)
    weight = getattr(head, "weight", None)
    if head is not None and isinstance(weight, Tensor) and weight.shape[0] == vocab:
        tables.append(head)  # pyright: ignore[reportArgumentType]
    embeddings = {
        id(parameter): parameter.numel() for table in tables for parameter in table.parameters()
    }
    total = sum(everything.values())
    return total, total - sum(embeddings.values())


def bytes_on_disk(directory: Path) -> int:
    """Bytes of a Hugging Face model directory, tokenizer included.

    Hidden files and weights in a second format next to safetensors do not count. Links, as in a
    hub snapshot, count with the file they lead to.

    Raises:
        ConfigError: If `directory` is not a directory.
    """
    if not directory.is_dir():
        raise ConfigError(
            f"{directory}: no such directory; expected a Hugging Face model directory"
        )
    files = [
        path
        for path in directory.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    if any(path.suffix == ".safetensors" for path in files):
        files = [path for path in files if path.suffix not in OTHER_WEIGHTS]
    return sum(path.stat().st_size for path in files)


def measure_speed(
    model: PreTrainedModel,
    *,
    device: torch.device,
    batch: int = 8,
    length: int = 128,
    repeats: int = 5,
    warmup: int = 2,
    seconds: float = SECONDS,
) -> Timing:
    """Time forward passes over fixed random ids, without a key-value cache.

    A large model gets fewer passes, at least one without a warm-up.

    Args:
        model: A model on `device`, in evaluation mode.
        device: Where the model is.
        batch: Sequences in the full batch.
        length: Tokens of every sequence.
        repeats: Timed passes; the median counts.
        warmup: Passes before the clock starts.
        seconds: After so long no further pass begins, of the full batch and of one sequence each.

    Raises:
        ConfigError: If a count is not positive.
    """
    for name, value in {"batch": batch, "length": length, "repeats": repeats}.items():
        if value < 1:
            raise ConfigError(f"{name}: found {value}, expected at least 1; raise it")
    config = model.config.get_text_config()
    ids = torch.randint(
        config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)
    )
    # A padding id in the random ids would move where a decoder reads its class.
    if config.pad_token_id is not None:
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    ids = ids.to(device)
    full = _pass_seconds(model, ids, repeats, warmup, seconds)
    single = _pass_seconds(model, ids[:1], repeats, warmup, seconds)
    return Timing(
        tokens_per_second=batch * length / statistics.median(full),
        latency_seconds=statistics.median(single),
        batch=batch,
        length=length,
        repeats=len(full),
        slowest=batch * length / max(full),
        fastest=batch * length / min(full),
        threads=torch.get_num_threads(),
        device=device.type,
    )


def _pass_seconds(
    model: PreTrainedModel, ids: Tensor, repeats: int, warmup: int, limit: float
) -> list[float]:
    """Seconds of forward passes, with the device's queue empty at both ends."""
    seconds = []
    with torch.inference_mode():
        while len(seconds) < warmup + repeats and (not seconds or sum(seconds) < limit):
            _synchronize(ids.device)
            start = time.perf_counter()
            model(input_ids=ids)
            _synchronize(ids.device)
            seconds.append(time.perf_counter() - start)
    # Where time was up before the warm-up ended, its last pass is the best there is.
    return seconds[warmup:] or seconds[-1:]


def _synchronize(device: torch.device) -> None:
    """Wait for an asynchronous device; the CPU is never behind."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cost_metrics(
    model: PreTrainedModel, *, directory: Path | None, timing: Timing | None
) -> dict[str, Any]:
    """Return the cost part of a model's metrics.

    Args:
        model: The model.
        directory: Its Hugging Face directory, or None where it has none.
        timing: The result of `measure_speed`; None if nothing was timed.

    Returns:
        `parameters`, `parameters_without_embeddings`, `bytes_on_disk`; with a timing also
        `tokens_per_second`, `latency_seconds`, and under `timing` how they were measured.
    """
    total, without = count_parameters(model)
    metrics: dict[str, Any] = {
        "parameters": total,
        "parameters_without_embeddings": without,
    }
    if timing is not None:
        details = asdict(timing)
        for name in ("tokens_per_second", "latency_seconds"):
            metrics[name] = details.pop(name)
        metrics["timing"] = details
    if directory is not None:
        metrics["bytes_on_disk"] = bytes_on_disk(directory)
    return metrics
