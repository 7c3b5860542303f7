"""A student's memory, told from parameters, is that of the student which they make."""

import pytest
import torch
from transformers.optimization import Adafactor

from pipeline.errors import ConfigError
from pipeline.planning.student_memory import FLOAT_BYTES, student_memory
from pipeline.student.align.distiller import Projectors
from pipeline.student.align.objective import Objective
from pipeline.student.model.build import build_student
from pipeline.student.model.origin import LoraOptions, StudentModel
from pipeline.student.vocabulary.vocabulary import keep_vocabulary
from pipeline.training.options import TrainOptions
from tests.tiny import tiny_config

TEACHER = tiny_config("llama", layers=4).to_dict()
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
ALIGNED = Objective.model_validate({"feature": {"weight": 0.1}, "attention": {"weight": 0.1}})


def memory(objective=ALIGNED, options=None, store_bytes=10**9, vocabulary=None, **model):
    return student_memory(
        model=StudentModel(**{"architecture": SMALL, **model}),
        objective=objective,
        options=options or TrainOptions(batch_size=4),
        teacher_config=TEACHER,
        task="causal-lm",
        max_length=32,
        feature_pairs=3,
        attention_pairs=2,
        head_bytes=500,
        token_bytes=1.5,
        segment_bytes=1000,
        pool_segments=4,
        store_bytes=store_bytes,
        vocabulary=vocabulary,
    )


def built(lora=None, **options):
    return build_student(
        # Not validated: parameters refuse adapters of random weights, whose number is the same.
        StudentModel(architecture=SMALL).model_copy(update={"lora": lora}),
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


def test_adafactor_keeps_means_of_rows_and_columns():
    student = built()
    optimizer = Adafactor(student.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    student(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values()]
    # Beside them a number or two of each tensor.
    found = FLOAT_BYTES * sum(v.numel() for v in kept if torch.is_tensor(v) and v.dim() > 0)
    assert memory(options=TrainOptions(optimizer="adafactor")).moment_bytes == found


def test_eight_bits_are_for_large_matrices_and_not_for_embeddings():
    wide = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "head_dim": 4}
    plain = memory(architecture=wide)
    small = memory(architecture=wide, options=TrainOptions(optimizer="adamw_8bit"))
    # Those of the block's MLP and the head; the embedding is as large as the head.
    matrices = 3 * 64 * 96 + 64 * 64
    assert plain.moment_bytes - small.moment_bytes == 2 * (FLOAT_BYTES - 1) * matrices


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
    twice, thrice = (memory(options=TrainOptions(batch_size=size)) for size in (8, 12))
    more = twice.activation_bytes - plain.activation_bytes
    assert thrice.activation_bytes - twice.activation_bytes == more > 0
    features = twice.teacher_bytes - plain.teacher_bytes
    # In use, next, and the first of two that are built ahead.
    assert features == 4 * 4 * 32 * 1.5
    assert twice.device_bytes - plain.device_bytes == more + features
    for option in ({"gradient_checkpointing": True}, {"precision": "bfloat16"}):
        less = memory(options=TrainOptions(batch_size=4, **option))
        assert less.activation_bytes < plain.activation_bytes
        assert less.weight_bytes == plain.weight_bytes


def test_states_logits_and_maps_of_long_rows_take_no_more_than_a_chunk():
    """Of four times as many tokens as fill a chunk, only the blocks' own activations grow."""
    losses = {term: {"weight": 0.1} for term in ("feature", "attention", "output")}
    both, bare = Objective.model_validate(losses), Objective()
    grown = []
    for size in (2**16, 2**18):
        options = TrainOptions(batch_size=size)
        grown.append([memory(one, options).activation_bytes for one in (both, bare)])
    tokens, width = 3 * 2**16 * 32, SMALL["hidden_size"]
    # Gradients of three layers' states, and of two layers' query and key.
    kept = (3 + 2 * 2) * tokens * width * FLOAT_BYTES
    assert (grown[1][0] - grown[0][0]) - (grown[1][1] - grown[0][1]) == kept


def test_the_gradient_of_the_head_waits_for_the_backward_pass():
    found = [memory(Objective.model_validate({"labels": {"weight": 1.0}})), memory(Objective())]
    vocab, tokens = TEACHER["vocab_size"], 4 * 32
    copies = 2 + 8  # two sides, and what the loss makes of them
    assert found[0].activation_bytes - found[1].activation_bytes == FLOAT_BYTES * (
        vocab * SMALL["hidden_size"] + copies * vocab * tokens
    )


def test_a_pool_is_used_while_the_next_is_read():
    assert memory().pool_bytes == 2 * 4 * 1000
    # No pool holds more than there is.
    assert memory(store_bytes=3000).pool_bytes == 3000


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.checkpoint .*: no configuration to be had"):
        memory(architecture=None, checkpoint=str(tmp_path))


def test_a_student_with_fewer_ids_has_fewer_parameters():
    kept = torch.arange(10)
    model = built()
    keep_vocabulary(model, kept)
    expected = sum(one.numel() for one in model.parameters())
    assert memory(vocabulary=10).parameters == expected < memory().parameters
