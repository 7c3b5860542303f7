"""A training step beside a live teacher, by plain transformers and written-out formulas.

Nothing of the taps, the store or the losses is used here: hidden states and maps are the models'
own outputs under eager attention, and each term is one line of the definition.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LAST_BLOCK = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gpt2": "transformer.h",
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
}


@dataclass(frozen=True)
class Outputs:
    hidden: list[Tensor]
    maps: tuple[Tensor, ...]
    logits: Tensor


def outputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> Outputs:
    """What a model says of itself; its last hidden state is taken before any final norm."""
    columns = ["input_ids", "attention_mask"]
    if model.config.model_type == "bert":
        columns.append("token_type_ids")
    inputs = {name: batch[name] for name in columns}
    if hasattr(model.config, "use_cache"):
        inputs["use_cache"] = False
    return outputs_of(model, inputs, output_attentions=True)


def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Any], **options: Any) -> Outputs:
    """The same from inputs given as they are."""
    raw = []
    last = model.get_submodule(LAST_BLOCK[model.config.model_type])[-1]
    handle = last.register_forward_hook(
        lambda module, args, output: raw.append(output if torch.is_tensor(output) else output[0])
    )
    found = model(**inputs, output_hidden_states=True, **options)
    handle.remove()
    hidden = [*found.hidden_states[:-1], raw[0]]
    return Outputs(hidden, found.attentions or (), found.logits)


def channel_statistics(
    teacher: PreTrainedModel, rows: list[dict[str, Tensor]], layers: list[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean and deviation of every channel over all tokens of `rows`, each run alone."""
    states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for row in rows:
            hidden = outputs(teacher, row).hidden
            for layer in layers:
                states[layer].append(hidden[layer][0].double())
    joined = {layer: torch.cat(found) for layer, found in states.items()}
    return {
        layer: (values.mean(0).float(), values.std(0, correction=0).float())
        for layer, values in joined.items()
    }


def terms(
    teacher: Outputs,
    student: Outputs,
    batch: Mapping[str, Any],
    *,
    task: str,
    statistics: Mapping[int, tuple[Tensor, Tensor]],
    projectors: Mapping[tuple[int, int], nn.Linear],
    attention_pairs: Mapping[int, int],
    temperature: float,
    top_k: int | None = None,
) -> dict[str, Tensor]:
    """Every term of the loss, averaged over the batch."""
    live = batch["attention_mask"].bool()
    found = {}
    distances = []
    for (s, t), projector in projectors.items():
        mean, deviation = statistics[t]
        target = (teacher.hidden[t] - mean) / deviation
        difference = projector(student.hidden[s]) - target
        distances.append(difference[live].square().mean())
    if distances:
        found["feature"] = torch.stack(distances).mean()
    divergences = []
    for s, t in attention_pairs.items():
        a, b = teacher.maps[t - 1], student.maps[s - 1]
        seen = a > 0
        ratio = torch.where(seen, a, 1.0).log() - torch.where(seen, b, 1.0).log()
        rows = (a * ratio).sum(-1)  # batch, heads, rows
        divergences.append(rows.mean(1)[live].mean())
    if divergences:
        found["attention"] = torch.stack(divergences).mean()
    p, q, targets = teacher.logits, student.logits, batch.get("labels")
    if task == "causal-lm":
        counted = (batch["loss_mask"] & live)[:, 1:]
        p, q = p[:, :-1][counted], q[:, :-1][counted]
        targets = batch["input_ids"][:, 1:][counted]
    p_log, q_log = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
    if top_k is not None:
        inside = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(top_k).indices, True)
        # The tail is one class of the teacher's and the student's mass outside the top k.
        p_in, q_in = p_log.exp()[inside].view(-1, top_k), q_log.exp()[inside].view(-1, top_k)
        p_all = torch.cat([p_in, 1 - p_in.sum(-1, keepdim=True)], -1)
        q_all = torch.cat([q_in, 1 - q_in.sum(-1, keepdim=True)], -1)
        p_log, q_log = p_all.log(), q_all.log()
    found["output"] = temperature**2 * (p_log.exp() * (p_log - q_log)).sum(-1).mean()
    q_label = q.log_softmax(-1)
    found["labels"] = -q_label.gather(1, targets[:, None]).mean()
    return found


def vectors(model: PreTrainedModel, batch: Mapping[str, Any], layer: int) -> dict[str, Tensor]:
    """Query (rotated where the family rotates), key and value of a block, by its own modules."""
    kind = model.config.model_type
    block = model.get_submodule(LAST_BLOCK[kind])[layer - 1]
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: found.update({name: output})

    names = {
        "llama": {f"self_attn.{one}_proj": one for one in "qkv"},
        "gpt2": {"attn.c_attn": "all"},
        "bert": {f"attention.self.{word}": word[0] for word in ("query", "key", "value")},
    }[kind]
    handles = [
        block.get_submodule(path).register_forward_hook(keep(name)) for path, name in names.items()
    ]
    outputs(model, batch)
    for handle in handles:
        handle.remove()
    if kind == "gpt2":
        found = dict(zip("qkv", found["all"].chunk(3, -1), strict=True))
    config = model.config
    d_head = config.hidden_size // config.num_attention_heads
    q, k, v = (found[one].unflatten(-1, (-1, d_head)).transpose(1, 2) for one in "qkv")
    if kind == "llama":
        position = torch.arange(q.shape[2])[None]
        cos, sin = model.model.rotary_emb(q, position)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return {"qq": q, "kk": k, "vv": v}


def relations(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    live: Tensor,
    *,
    names: tuple[str, ...],
    heads: int,
    causal: bool,
) -> Tensor:
    """MiniLMv2's loss of one pair of layers, example by example."""
    found = []
    for name in names:
        total = torch.zeros(())
        for row, length in enumerate(live.sum(-1).tolist()):
            maps = []
            for side in (teacher[name], student[name]):
                joined = side[row].transpose(0, 1).reshape(side.shape[2], -1)[:length]
                split = joined.view(length, heads, -1).transpose(0, 1)
                scores = split @ split.transpose(1, 2) / split.shape[-1] ** 0.5
                if causal:
                    scores = scores + torch.full((length, length), -torch.inf).triu(1)
                maps.append(scores.softmax(-1))
            p, q = maps
            ratio = torch.where(p > 0, p, 1.0).log() - torch.where(p > 0, q, 1.0).log()
            total = total + (p * ratio).sum(-1).mean(0).sum()
        found.append(total / live.sum())
    return torch.stack(found).mean()
