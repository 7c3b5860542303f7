"""Students come out as configured, repeat by seed, and start from the teacher's own blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import FalconConfig, PreTrainedModel

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.student.model.build import build_student
from pipeline.student.model.origin import StudentModel
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.row_length import longest_row
from tests.tiny import CAUSAL, PAD_ID, tiny_batch, tiny_config, tiny_model

CLASSES = ("negative", "neutral", "positive")


def build(kind: str, architecture: dict[str, Any] | None, **options: Any) -> PreTrainedModel:
    """A student of a tiny teacher of 4 blocks."""
    causal = kind in CAUSAL
    arguments: dict[str, Any] = {
        "teacher_config": tiny_config(kind, layers=4).to_dict(),
        "vocab": 64,
        "classes": () if causal else CLASSES,
        "task": "causal-lm" if causal else "classification",
        "seed": 0,
    }
    own = ("checkpoint", "revision", "init", "lora")
    model = {key: options.pop(key) for key in own if key in options}
    return build_student(StudentModel(architecture=architecture, **model), **arguments | options)


def weights_of(teacher: PreTrainedModel, path: Path, layers: tuple[int, ...]) -> Path:
    """What capture writes: all but the blocks, and the chosen blocks."""
    anatomy = find_anatomy(teacher)
    kept = {
        name: value.clone()
        for name, value in teacher.state_dict().items()
        if anatomy.block_of(name) in (None, *layers)
    }
    save_file(kept, path)
    return path


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("llama", {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24}),
        ("qwen3", {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2}),
        ("gpt2", {"num_hidden_layers": 3, "hidden_size": 16}),
        ("gpt2", {"n_layer": 3, "n_embd": 16}),
        ("bert", {"num_hidden_layers": 3, "hidden_size": 16}),
        ("distilbert", {"num_hidden_layers": 3, "hidden_size": 16}),
        ("distilbert", {"n_layers": 3, "dim": 16, "hidden_dim": 20}),
    ],
)
def test_keys_override_the_teachers(kind, architecture, tmp_path):
    student = build(kind, architecture)
    anatomy = find_anatomy(student)
    assert (anatomy.depth, anatomy.width) == (3, 16)
    assert anatomy.head_dim * anatomy.heads == 16
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    batch = tiny_batch([5, 3])
    logits = student.eval()(**batch).logits
    assert logits.shape[-1] == (64 if kind in CAUSAL else len(CLASSES))
    teacher = tiny_config(kind)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert getattr(student.config, key) == getattr(teacher, key)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, logits)


def test_classes_are_the_corpus_own():
    config = build("bert", {}).config
    assert config.id2label == dict(enumerate(CLASSES))
    assert config.label2id == {"negative": 0, "neutral": 1, "positive": 2}
    assert config.num_labels == 3


@pytest.mark.parametrize(
    ("task", "classes", "outputs", "problem"),
    [
        ("classification", CLASSES, 3, "single_label_classification"),
        ("multi-label", CLASSES, 3, "multi_label_classification"),
        ("multi-label", ("spam",), 1, "multi_label_classification"),
        ("regression", (), 1, "regression"),
    ],
)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_sequence_task_decides_head_and_loss(kind, task, classes, outputs, problem, tmp_path):
    student = build(kind, {}, task=task, classes=classes)
    assert student.config.problem_type == problem
    assert student.config.num_labels == outputs
    if classes:
        assert tuple(student.config.id2label.values()) == classes
    batch = tiny_batch([5, 3])
    targets = (
        torch.zeros(2, dtype=torch.long) if task == "classification" else torch.zeros(2, outputs)
    )
    found = student.eval()(**batch, labels=targets)
    assert found.logits.shape == (2, outputs)
    assert torch.isfinite(found.loss)
    student.save_pretrained(tmp_path)
    checked = build(kind, None, checkpoint=str(tmp_path), task=task, classes=classes).eval()
    torch.testing.assert_close(checked(**batch).logits, found.logits)


@pytest.mark.parametrize("task", ["prompt-target", "messages"])
def test_every_language_task_has_a_language_model(task):
    assert build("llama", {}, task=task).get_output_embeddings() is not None


def test_another_family_inherits_what_the_tokenizer_fixes():
    student = build("llama", {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2})
    assert student.config.model_type == "gpt2"
    assert student.config.vocab_size == 64
    assert student.config.n_positions == tiny_config("llama").max_position_embeddings
    assert student.config.eos_token_id == 2


def test_the_seed_alone_decides_and_the_process_random_state_stays():
    state = torch.get_rng_state()
    one, same, other = (build("llama", {}, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_values_that_follow_from_changed_keys_follow():
    teacher = tiny_config("llama", layers=4, kv_heads=4).to_dict()  # head_dim 8 is spelt out
    config = build(
        "llama", {"hidden_size": 24, "num_attention_heads": 2}, teacher_config=teacher
    ).config
    assert (config.head_dim, config.num_key_value_heads) == (12, 2)
    kept = build("llama", {"hidden_size": 16, "head_dim": 8}).config
    assert (kept.head_dim, kept.num_key_value_heads) == (8, 2)
    based = build("llama", {"rope_theta": 500.0}).config
    assert based.rope_parameters["rope_theta"] == 500.0


def test_lists_of_layers_are_picked_like_the_layers():
    gemma = tiny_config("gemma2", layers=4).to_dict()
    assert gemma["layer_types"] == ["sliding_attention", "full_attention"] * 2
    uniform = build("gemma2", {"num_hidden_layers": 2}, teacher_config=gemma).config
    assert uniform.layer_types == ["full_attention", "full_attention"]
    odd = build(
        "gemma2", {"num_hidden_layers": 2}, teacher_config=gemma, layer_choice=[1, 4]
    ).config
    assert odd.layer_types == ["sliding_attention", "full_attention"]
    qwen = tiny_config(
        "qwen3", layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ).to_dict()
    config = build("qwen3", {"num_hidden_layers": 2}, teacher_config=qwen).config
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.max_window_layers == 1


@pytest.mark.parametrize(
    ("kind", "architecture", "match"),
    [
        ("llama", {"hiden_size": 8}, r"hiden_size: no key .* LlamaConfig; did you mean 'hidden_s"),
        ("distilbert", {"intermediate_size": 8}, "intermediate_size: no key .* DistilBertConfig"),
        ("llama", {"num_labels": 3}, "num_labels: no key of an architecture"),
        ("llama", {"hidden_size": "big"}, "LlamaConfig refuses it"),
        ("gpt2", {"n_embd": 16, "hidden_size": 16}, "hidden_size: .* the same as 'n_embd'"),
        ("llama", {"hidden_size": 18}, "18 is no multiple of num_attention_heads 4|refuses"),
        ("llama", {"num_attention_heads": 1}, "1 is no multiple of num_key_value_heads 2"),
        ("llama", {"model_type": "distilbert"}, "no causal-lm model of type distilbert"),
    ],
)
def test_an_architecture_that_makes_no_model_is_one_line(kind, architecture, match):
    with pytest.raises(ConfigError, match=match) as caught:
        build(kind, architecture)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "options", "match"),
    [
        ({"vocab_size": 65}, {}, "vocab_size is 65, the teacher's 64"),
        ({"eos_token_id": 5}, {}, "eos_token_id is 5, the teacher's 2"),
        ({}, {"vocab": 70}, "tokenizer has 70 ids, its embedding 64 rows"),
        ({"model_type": "no-such"}, {}, "model_type is 'no-such'"),
        ({"num_hidden_layers": 2}, {"layer_choice": [1]}, "1 teacher blocks are listed"),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused_with_both_values(architecture, options, match):
    with pytest.raises(IncompatibleError, match=match):
        build("llama", architecture, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"architecture": {}, "task": "classification", "classes": ("one",)}, "at least 2 classes"),
        ({"architecture": {}, "task": "multi-label", "classes": ()}, "at least 1 classes"),
    ],
)
def test_too_few_classes_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        build("llama", **options)


# From a checkpoint


def test_a_checkpoint_brings_its_weights(tmp_path):
    source = tiny_model("llama", layers=1, eos_token_id=3)
    source.save_pretrained(tmp_path)
    student = build("llama", None, checkpoint=str(tmp_path)).eval()
    batch = tiny_batch([4])
    torch.testing.assert_close(student(**batch).logits, source(**batch).logits)
    assert student.config.eos_token_id == 2  # the teacher's, whose tokenizer the student gets


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    tiny_model("llama", vocab=80).save_pretrained(tmp_path)
    with pytest.raises(IncompatibleError, match="vocab_size is 80, the teacher's 64"):
        build("llama", None, checkpoint=str(tmp_path))


def test_a_checkpoint_that_is_none_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no causal-lm model comes of it") as caught:
        build("llama", None, checkpoint=str(tmp_path))
    assert "\n" not in str(caught.value)


# From the teacher's blocks


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert", "distilbert"])
def test_a_student_of_all_blocks_is_the_teacher(kind, tmp_path):
    teacher = tiny_model(kind, layers=4, num_labels=3)
    blocks = weights_of(teacher, tmp_path / "blocks.safetensors", (1, 2, 3, 4))
    student = build(
        kind, {}, init="teacher-layers", blocks=blocks, teacher_config=teacher.config.to_dict()
    ).eval()
    batch = tiny_batch([7, 4])
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("choice", "taken"), [("uniform", 4), ([2], 2)])
def test_a_student_of_one_block_has_that_block_and_all_outside(kind, choice, taken, tmp_path):
    teacher = tiny_model(kind, layers=4, num_labels=3)
    blocks = weights_of(teacher, tmp_path / "blocks.safetensors", (2, 4))
    student = build(
        kind,
        {"num_hidden_layers": 1},
        init="teacher-layers",
        blocks=blocks,
        layer_choice=choice,
        teacher_config=teacher.config.to_dict(),
    )
    anatomy, theirs = find_anatomy(student), teacher.state_dict()
    for name, value in student.state_dict().items():
        source = name.replace(f"{anatomy.path}.0.", f"{anatomy.path}.{taken - 1}.")
        assert torch.equal(value, theirs[source]), name


def test_tied_embeddings_fill_from_either_name(tmp_path):
    teacher = tiny_model("llama", layers=4, tie_word_embeddings=True)
    weights = teacher.state_dict()
    del weights["lm_head.weight"]  # as safetensors of a tied model have it
    save_file({k: v.clone() for k, v in weights.items()}, tmp_path / "b.safetensors")
    config = teacher.config.to_dict()
    options = {"init": "teacher-layers", "blocks": tmp_path / "b.safetensors"}
    student = build("llama", {}, teacher_config=config, **options).eval()
    batch = tiny_batch([5])
    assert torch.equal(student(**batch).logits, teacher(**batch).logits)
    with pytest.raises(IncompatibleError, match=r"b\.safetensors has no lm_head\.weight"):
        build("llama", {"tie_word_embeddings": False}, teacher_config=config, **options)


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        ({"hidden_size": 16}, "student's head_dim is 4, the teacher's 8; .* give head_dim 8"),
        ({"num_attention_heads": 8, "head_dim": 4}, "num_attention_heads is 8, the teacher's 4"),
        ({"intermediate_size": 80}, "intermediate_size is 80, the teacher's 64"),
        ({"model_type": "mistral"}, "model_type is mistral, the teacher's llama"),
        ({"num_hidden_layers": 1, "max_position_embeddings": 32}, None),  # rotary: no weights
        ({"num_hidden_layers": 4}, r"block 1 is not in blocks\.safetensors \(it has 2, 4\)"),
        ({"num_hidden_layers": 1, "attention_bias": True}, r"has no .*q_proj\.bias"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(architecture, match, tmp_path):
    blocks = weights_of(tiny_model("llama", layers=4), tmp_path / "blocks.safetensors", (2, 4))
    if match is None:
        build("llama", architecture, init="teacher-layers", blocks=blocks)
        return
    with pytest.raises(IncompatibleError, match=match):
        build("llama", architecture, init="teacher-layers", blocks=blocks)


def test_a_shape_or_a_weight_without_place_is_refused(tmp_path):
    teacher = tiny_model("gpt2", layers=1)
    blocks = weights_of(teacher, tmp_path / "blocks.safetensors", (1,))
    config = teacher.config.to_dict()
    with pytest.raises(IncompatibleError, match=r"wpe\.weight is \(8, 32\) in the student, \(64"):
        build(
            "gpt2", {"n_positions": 8}, init="teacher-layers", blocks=blocks, teacher_config=config
        )
    biased = tiny_model("llama", layers=1, attention_bias=True)
    weights_of(biased, blocks, (1,))
    with pytest.raises(IncompatibleError, match=r"no place for the teacher's .*bias"):
        build(
            "llama",
            {"attention_bias": False},
            init="teacher-layers",
            blocks=blocks,
            teacher_config=biased.config.to_dict(),
        )


def test_no_blocks_or_a_broken_file_is_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="the store holds no blocks of the teacher"):
        build("llama", {}, init="teacher-layers")
    broken = tmp_path / "blocks.safetensors"
    for content in (None, b"", b"not safetensors at all"):
        if content is not None:
            broken.write_bytes(content)
        with pytest.raises(IntegrityError, match=r"blocks\.safetensors: not readable"):
            build("llama", {}, init="teacher-layers", blocks=broken)


def test_an_inherited_table_of_positions_holds_the_teachers_rows():
    teacher = tiny_config("bert").to_dict()
    positions = teacher["max_position_embeddings"]
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}

    def student(**keys):
        return build_student(
            StudentModel(architecture={"model_type": "roberta", **small, **keys}),
            teacher_config=teacher,
            vocab=64,
            classes=("no", "yes"),
            task="classification",
            seed=0,
        )

    inherits = student()
    assert longest_row(inherits) == positions
    assert inherits.config.max_position_embeddings == positions + PAD_ID + 1
    # A number that was written down stays.
    assert student(max_position_embeddings=40).config.max_position_embeddings == 40


@pytest.mark.parametrize("own", [{}, {"num_attention_heads": 2}, {"hidden_size": 16}])
def test_a_falcon_student_of_a_falcon_teacher(own):
    teacher = FalconConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, multi_query=False
    )
    student = build_student(
        StudentModel(architecture={"num_hidden_layers": 1, **own}),
        teacher_config=teacher.to_dict(),
        vocab=64,
        classes=(),
        task="causal-lm",
        seed=0,
    )
    assert student.config.num_kv_heads == student.config.num_attention_heads
    assert (
        student.config.head_dim == student.config.hidden_size // student.config.num_attention_heads
    )
