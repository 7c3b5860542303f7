"""A student's memory, told from parameters, is that of the student which they make."""

import pytest

from pipeline.errors import ConfigError
from pipeline.student.build import build_student
from pipeline.student.memory import FLOAT_BYTES, student_memory
from pipeline.student.objective import Objective
from pipeline.student.origin import LoraOptions, StudentModel
from pipeline.student.projectors import Projectors
from pipeline.training.options import TrainOptions
from tests.tiny import tiny_config

TEACHER = tiny_config("llama", layers=4).to_dict()
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
ALIGNED = Objective.model_validate({"feature": {"weight": 0.1}, "attention": {"weight": 0.1}})


def memory(objective=ALIGNED, options=None, **model):
    return student_memory(
        model=StudentModel(**{"architecture": SMALL, **model}),
        objective=objective,
        options=options or TrainOptions(batch_size=4),
        teacher_config=TEACHER,
        task="causal-lm",
        max_length=32,
        feature_pairs=3,
        attention_pairs=2,
        segment_bytes=1000,
        pool_segments=4,
    )


def built(**options):
    return build_student(
        architecture=SMALL,
        checkpoint=None,
        init="random",
        teacher_config=TEACHER,
        vocab=64,
        classes=(),
        task="causal-lm",
        seed=0,
        **options,
    )


def test_weights_gradients_and_moments_are_those_of_the_student():
    parameters = sum(one.numel() for one in built().parameters())
    found = memory()
    assert (found.parameters, found.trained) == (parameters, parameters)
    assert found.weight_bytes == found.gradient_bytes == FLOAT_BYTES * parameters
    assert found.moment_bytes == 2 * found.weight_bytes


def test_adapters_alone_have_gradients():
    pytest.importorskip("peft")
    adapters = LoraOptions(r=2)
    student = built(lora=adapters)
    found = memory(lora=adapters, init="teacher-layers")
    assert found.parameters == sum(one.numel() for one in student.parameters())
    assert found.trained == sum(one.numel() for one in student.parameters() if one.requires_grad)
    assert 0 < found.trained < found.parameters


def test_projectors_are_counted_with_their_gradient_and_moments_where_they_train():
    pairs = Projectors("linear", {0: 0, 1: 2, 2: 4}, d_student=16, d_teacher=32)
    parameters = sum(one.numel() for one in pairs.parameters())
    assert memory().projector_bytes == 4 * FLOAT_BYTES * parameters
    assert memory(objective=Objective()).projector_bytes == 0


def test_a_larger_batch_takes_more_and_checkpointing_and_half_precision_less():
    plain = memory()
    twice = memory(options=TrainOptions(batch_size=8))
    assert twice.activation_bytes == 2 * plain.activation_bytes
    assert twice.device_bytes - plain.device_bytes == plain.activation_bytes
    for option in ({"gradient_checkpointing": True}, {"precision": "bfloat16"}):
        less = memory(options=TrainOptions(batch_size=4, **option))
        assert less.activation_bytes < plain.activation_bytes
        assert less.weight_bytes == plain.weight_bytes


def test_a_pool_holds_the_segments_before_and_after_it():
    assert memory().pool_bytes == 10 * 1000


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.checkpoint .*: no configuration to be had"):
        memory(architecture=None, checkpoint=str(tmp_path))
