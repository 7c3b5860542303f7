"""Tiny random models and batches, built in code, with weights wide enough to show errors.

Default initialisation leaves attention nearly uniform and norms at one, where a wrong scale, a
dropped bias or a missed final norm changes almost nothing. Every parameter is therefore drawn anew.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CohereConfig,
    DebertaV2Config,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    RobertaConfig,
)

from pipeline.tasks import models_language

Kind = Literal[
    "llama",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "mistral",
    "gemma2",
    "gpt_oss",
    "granite",
    "cohere",
    "bert",
    "roberta",
    "distilbert",
    "deberta_v2",
]
CAUSAL = ("llama", "qwen3", "gpt2", "gpt_neox", "mistral", "gemma2", "gpt_oss", "granite", "cohere")
MAX_LENGTH = 64
PAD_ID = 0


def tiny_config(
    kind: Kind,
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 64,
    num_labels: int = 2,
    **options: Any,
) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "pad_token_id": PAD_ID,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": num_labels,
    }
    modern = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "intermediate_size": 2 * width,
        "max_position_embeddings": MAX_LENGTH,
    }
    encoder = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
        "max_position_embeddings": MAX_LENGTH + 2,
        "type_vocab_size": 2,
        "num_labels": num_labels,
    }
    match kind:
        case "llama":
            return LlamaConfig(**common | modern | options)
        case "qwen3":
            return Qwen3Config(**common | modern | options)
        case "granite":
            del modern["head_dim"]
            return GraniteConfig(**common | modern | {"logits_scaling": 3.0} | options)
        case "cohere":
            del modern["head_dim"]
            return CohereConfig(**common | modern | {"logit_scale": 0.25} | options)
        case "mistral":
            return MistralConfig(**common | modern | {"sliding_window": 8} | options)
        case "gemma2":
            extra = {
                "query_pre_attn_scalar": width // heads,
                "attn_logit_softcapping": 1.0,
                "final_logit_softcapping": 5.0,
                "sliding_window": MAX_LENGTH,
            }
            return Gemma2Config(**common | modern | extra | options)
        case "gpt_oss":
            extra = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": MAX_LENGTH}
            return GptOssConfig(**common | modern | extra | options)
        case "gpt2":
            sizes = {
                "n_embd": width,
                "n_layer": layers,
                "n_head": heads,
                "n_positions": MAX_LENGTH,
                "num_labels": num_labels,
            }
            return GPT2Config(**common | sizes | options)
        case "gpt_neox":
            del modern["num_key_value_heads"], modern["head_dim"]
            return GPTNeoXConfig(**common | modern | options)
        case "bert":
            return BertConfig(**common | encoder | options)
        case "roberta":
            return RobertaConfig(**common | encoder | options)
        case "deberta_v2":
            extra = {
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 8,
            }
            return DebertaV2Config(**common | encoder | extra | options)
        case "distilbert":
            sizes = {
                "dim": width,
                "n_layers": layers,
                "n_heads": heads,
                "hidden_dim": 2 * width,
                "max_position_embeddings": MAX_LENGTH,
                "num_labels": num_labels,
            }
            return DistilBertConfig(**common | sizes | options)


def tiny_model(
    kind: Kind, *, seed: int = 0, task: str | None = None, **options: Any
) -> PreTrainedModel:
    """A causal language model for decoders, a classifier for encoders, unless `task` differs."""
    config = tiny_config(kind, **options)
    task = task or ("causal-lm" if kind in CAUSAL else "classification")
    factory = AutoModelForCausalLM if models_language(task) else AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.2 if parameter.ndim > 1 else 0.1)
    return model.eval()


def tiny_batch(lengths: Sequence[int], vocab: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Right-padded random ids, none of them the padding id, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    seq = max(lengths)
    input_ids = torch.full((len(lengths), seq), PAD_ID)
    attention_mask = torch.zeros((len(lengths), seq), dtype=torch.long)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(3, vocab, (length,), generator=generator)
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
