"""A narrower student is cut out of its teacher: what counts stays, what is nothing goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.student.model.build import build_student
from pipeline.student.model.origin import StudentModel
from pipeline.student.model.width import Sizes, WidthCut, check_cut
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.magnitudes import PREFIX, input_magnitudes
from tests.tiny import CAUSAL, Kind, tiny_batch, tiny_model

KINDS: tuple[Kind, ...] = ("llama", "qwen3", "mistral", "gpt2", "bert", "roberta", "distilbert")
D_HEAD = 8  # of 4 heads, a width of 32

NARROW_HEADS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": D_HEAD},
    "qwen3": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": D_HEAD},
}
NEURONS = {"gpt2": "n_inner", "distilbert": "hidden_dim"}


def cut(teacher: PreTrainedModel, architecture: dict[str, Any], path: Path, **options: Any) -> Any:
    """A student cut out of a teacher whose blocks were all kept."""
    causal = teacher.config.model_type in CAUSAL
    tensors = {name: value.clone() for name, value in teacher.state_dict().items()}
    read = input_magnitudes(teacher, [tiny_batch([9, 7, 4])], is_causal=causal)
    tensors |= {f"{PREFIX}{name}": value for name, value in read.items()}
    save_file(tensors, path / "b.safetensors")
    return build_student(
        StudentModel(architecture=architecture, init="teacher-layers"),
        teacher_config=teacher.config.to_dict(),
        vocab=64,
        classes=() if causal else ("no", "yes"),
        task="causal-lm" if causal else "classification",
        seed=0,
        blocks=path / "b.safetensors",
        **options,
    ).eval()


def weight(model: PreTrainedModel, block: int, *endings: str) -> Tensor:
    """A block's weight by the end of its name, whichever family's it is; output first."""
    prefix = f"{find_anatomy(model).path}.{block - 1}."
    found = [
        (name, value)
        for name, value in model.named_parameters()
        if name.startswith(prefix) and name.endswith(endings)
    ]
    assert len(found) == 1, (endings, [name for name, _ in found])
    return found[0][1].T if model.config.model_type == "gpt2" else found[0][1]


OUT = ("o_proj.weight", "attn.c_proj.weight", "attention.output.dense.weight", "out_lin.weight")
DOWN = (
    *("down_proj.weight", "mlp.c_proj.weight", "lin2.weight"),
    *(f"layer.{i}.output.dense.weight" for i in range(2)),
)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_cut_is_the_teacher(kind, tmp_path):
    teacher = tiny_model(kind)
    student = cut(teacher, {}, tmp_path)
    batch = tiny_batch([7, 4])
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_groups_of_heads_that_say_nothing_go_without_a_trace(kind, tmp_path):
    teacher = tiny_model(kind)  # 4 heads, 2 keys
    with torch.no_grad():
        for block, dead in ((1, 0), (2, 1)):
            weight(teacher, block, *OUT)[:, 16 * dead : 16 * dead + 16] = 0
    student = cut(teacher, NARROW_HEADS[kind], tmp_path)
    batch = tiny_batch([9, 5])
    torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_that_say_nothing_go_without_a_trace(kind, tmp_path):
    teacher = tiny_model(kind)
    total = Sizes.of(teacher.config).neurons
    alive = {}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in (1, 2):
            alive[block] = torch.randperm(total, generator=generator)[:24].sort().values
            dead = torch.ones(total, dtype=torch.bool)
            dead[alive[block]] = False
            weight(teacher, block, *DOWN)[:, dead] = 0
    student = cut(teacher, {NEURONS.get(kind, "intermediate_size"): 24}, tmp_path)
    for block in (1, 2):
        expected = weight(teacher, block, *DOWN)[:, alive[block]]
        assert torch.equal(weight(student, block, *DOWN), expected)
    batch = tiny_batch([9, 5])
    torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_and_heads_with_weight_are_kept_and_a_step_trains(kind, tmp_path):
    """No equality: a norm over fewer channels is another norm."""
    teacher = tiny_model(kind)
    heavy = torch.tensor([0, 3, 4, 5, 9, 11, 14, 17, 18, 20, 22, 25, 26, 28, 30, 31])
    with torch.no_grad():
        light = torch.ones(32, dtype=torch.bool)
        light[heavy] = False
        teacher.get_input_embeddings().weight[:, light] *= 1e-3
        for name, value in teacher.named_parameters():
            if name.endswith((*OUT, *DOWN)):
                (value.T if kind == "gpt2" else value)[light] *= 1e-3
            if name.endswith(("LayerNorm.weight", "layer_norm.weight")):
                value[light] *= 1e-3  # what comes after a norm is what is read
        weight(teacher, 1, *OUT)[:, :16] = 0
        weight(teacher, 2, *OUT)[:, 16:] = 0
    architecture = {"hidden_size": 16, "num_attention_heads": 2}
    if kind in ("llama", "qwen3", "mistral"):
        architecture |= {"num_key_value_heads": 1, "head_dim": D_HEAD}
    student = cut(teacher, architecture, tmp_path)
    ours, theirs = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    assert torch.equal(ours, theirs[:, heavy])
    for block, heads in ((1, slice(16, 32)), (2, slice(0, 16))):
        expected = weight(teacher, block, *OUT)[heavy, heads]
        assert torch.equal(weight(student, block, *OUT), expected)
    logits = student(**tiny_batch([6, 3])).logits
    logits.logsumexp(-1).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("kind", "architecture", "match"),
    [
        ("llama", {"hidden_size": 16}, "head_dim is 4, the teacher's 8; .* give head_dim 8"),
        ("bert", {"hidden_size": 16}, "head_dim is 4, the teacher's 8"),
        ("llama", {"hidden_size": 64, "head_dim": 8}, "hidden_size is 64, the teacher's 32"),
        ("llama", {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 2},
         "1 of the student's heads share a key, 2 of the teacher's; .* num_key_value_heads 1"),
        ("llama", {"intermediate_size": 65}, "intermediate_size is 65, the teacher's 64"),
        ("gemma2", {"intermediate_size": 16}, r"the teacher's model.layers.0.\w+_feedforward"),
        ("gpt_neox", {"intermediate_size": 16}, "not known what the axes of the teacher's"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_named(kind, architecture, match, tmp_path):
    with pytest.raises(IncompatibleError, match=match):
        cut(tiny_model(kind), architecture, tmp_path)


def test_equal_parts_keep_their_order_and_the_choice_repeats():
    block = "m.layers.0"
    weights = {
        f"{block}.mlp.up_proj.weight": torch.ones(6, 4),
        f"{block}.mlp.down_proj.weight": torch.ones(4, 6),
        f"{block}.self_attn.o_proj.weight": torch.ones(4, 4),
    }
    magnitudes = {name: torch.ones(value.shape[1]) for name, value in weights.items()}
    teacher = Sizes(width=4, heads=2, key_heads=2, head_width=2, neurons=6)
    student = Sizes(width=3, heads=2, key_heads=2, head_width=2, neurons=2)
    check_cut(student, teacher)
    found = WidthCut(
        weights,
        dict.fromkeys(weights, 1),
        teacher=teacher,
        student=student,
        magnitudes=magnitudes,
    )
    assert found.channels.tolist() == [0, 1, 2]
    assert found.neurons[1].tolist() == [0, 1]
    del magnitudes[f"{block}.mlp.up_proj.weight"]
    with pytest.raises(IncompatibleError, match=r"how large the inputs of m.layers.0.mlp.up_proj"):
        WidthCut(
            weights,
            dict.fromkeys(weights, 1),
            teacher=teacher,
            student=student,
            magnitudes=magnitudes,
        )


def test_what_is_read_strongly_is_kept_whatever_its_weights(tmp_path):
    teacher = tiny_model("llama")
    with torch.no_grad():
        # Neurons 8 to 39 answer a hundred times as loudly as the others, by the same weights out.
        for block in (1, 2):
            weight(teacher, block, "up_proj.weight")[8:40] *= 100
    student = cut(teacher, {"intermediate_size": 32}, tmp_path)
    for block in (1, 2):
        assert torch.equal(weight(student, block, *DOWN), weight(teacher, block, *DOWN)[:, 8:40])
