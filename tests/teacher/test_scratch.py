"""A teacher that is to be built: its configuration."""

import pytest

from pipeline.errors import ConfigError
from pipeline.teacher.source.scratch import scratch_config


def test_a_scratch_configuration_takes_the_tokenizers_vocabulary():
    config = scratch_config(
        {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2},
        task="classification",
        classes=("no", "yes"),
        vocab=77,
        pad_id=1,
        key="teachers.main",
    )
    assert (config.vocab_size, config.pad_token_id, config.num_labels) == (77, 1, 2)
    with pytest.raises(ConfigError, match=r"x\.model\.scratch: model_type is 'nobody'"):
        scratch_config(
            {"model_type": "nobody"}, task="causal-lm", classes=(), vocab=7, pad_id=0, key="x"
        )
