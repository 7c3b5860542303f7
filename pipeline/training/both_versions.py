"""Makes a saved model readable by transformers 4.57 as well as 5.

Version 5 renamed keys that version 4 then ignores without a word: a model would be loaded with
another rotary base. Here such a key is written under both names, with one value.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.provenance import read_json, write_bytes_atomically

ROPE = "rope_parameters"
NOT_SCALING = ("rope_theta", "partial_rotary_factor")
"""What version 4 has at the top level, where version 5 has it in `rope_parameters`."""
PLAIN = {key: key for key in NOT_SCALING}
GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
OWN_NAMES = {"gpt_neox": GPT_NEOX, "gpt_neox_japanese": GPT_NEOX}
"""Families that call these otherwise in version 4."""
BY_LAYER = {
    "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    "modernbert": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
}
"""Where version 4 has the base of each kind of layer."""


def write_for_both(directory: Path) -> None:
    """Add version 4's names to `config.json` and `tokenizer_config.json`, where they are missing.

    Version 5 reads the files as before.

    Raises:
        ResourceError: If a file cannot be written.
    """
    for name, change in (("config.json", _config), ("tokenizer_config.json", _tokenizer)):
        path = directory / name
        if path.exists():
            text = json.dumps(change(read_json(path)), indent=2, sort_keys=True, ensure_ascii=False)
            write_bytes_atomically(path, f"{text}\n".encode())


def _config(config: dict[str, Any]) -> dict[str, Any]:
    more = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope, family = config.get(ROPE) or {}, config.get("model_type", "")
    for kind, name in BY_LAYER.get(family, {}).items():
        if rope.get(kind):
            more[name] = rope[kind]["rope_theta"]
    if "rope_theta" in rope:
        names = OWN_NAMES.get(family, PLAIN)
        more |= {names[key]: rope[key] for key in NOT_SCALING if key in rope}
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key not in NOT_SCALING}
            more["rope_scaling"] = scaling
    return more | config


def _tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    # The same class; version 5 knows it by both names.
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Version 4 expects a mapping under the new name.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
