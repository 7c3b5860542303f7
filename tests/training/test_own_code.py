"""Code that a model brings is found in its configuration, without running any of it."""

import json

import pytest

from pipeline.training.own_code import is_elsewhere, own_code


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({}, []),
        ({"auto_map": {}}, []),
        ({"auto_map": {"AutoConfig": "a.Config", "AutoModel": ["b.Model", None]}},
         ["a.Config", "b.Model"]),
        ({"attn_implementation": "sdpa"}, []),
        ({"attn_implementation": {"": "eager", "text_config": "owner/kernel@v1"}},
         ["owner/kernel@v1"]),
        ({"_attn_implementation": "owner/kernel"}, ["owner/kernel"]),
    ],
)  # fmt: skip
def test_every_place_is_named(config, places, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    assert own_code(str(tmp_path)) == places


def test_what_cannot_be_read_is_left_to_who_loads_it(tmp_path):
    assert own_code(str(tmp_path)) == []
    (tmp_path / "config.json").write_text("{")
    assert own_code(str(tmp_path)) == []


def test_only_a_file_beside_the_weights_is_of_the_models_revision():
    assert not is_elsewhere("modeling.Model")
    assert is_elsewhere("owner/name--modeling.Model")
    assert is_elsewhere("owner/kernel")
