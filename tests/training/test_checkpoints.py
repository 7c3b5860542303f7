"""A checkpoint counts when its marker is there, and a run that diverges is stopped."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import IntegrityError
from pipeline.provenance import read_json
from pipeline.training.checkpoints import MARKER, CompletionMarker, Progress
from pipeline.training.checkpoints import last_complete_checkpoint as last
from pipeline.training.options import TrainOptions, training_arguments


def test_the_newest_checkpoint_with_a_marker_counts(tmp_path):
    assert last(tmp_path) is None
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last(tmp_path) is None
    for step in (9, 20):
        (tmp_path / f"checkpoint-{step}" / MARKER).write_text("{}")
    assert last(tmp_path) == str(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-100" / MARKER).write_text("{}")
    assert last(tmp_path) == str(tmp_path / "checkpoint-100")
    assert last(tmp_path / "nowhere") is None


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_process_alone_marks(is_first, tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    (checkpoint / "deep").mkdir(parents=True)
    (checkpoint / "deep" / "state.bin").write_bytes(b"1")
    state = TrainerState(is_world_process_zero=is_first, global_step=7)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    CompletionMarker().on_save(arguments, state, TrainerControl())
    if is_first:
        assert read_json(checkpoint / MARKER) == {"step": 7}
    else:
        assert last(tmp_path) is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_run_that_diverges_is_stopped_with_the_step(loss, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = TrainerState(global_step=12)
    with pytest.raises(IntegrityError, match=rf"train x: the loss is {loss} at step 12"):
        Progress("train x").on_log(arguments, state, TrainerControl(), {"loss": loss})


def test_options_mean_what_they_say(tmp_path):
    options = TrainOptions(
        steps=40, batch_size=3, gradient_accumulation_steps=2, warmup=0.25, seed=7,
        gradient_checkpointing=True, max_grad_norm=0.5,
    )  # fmt: skip
    found = training_arguments(options, tmp_path, "cpu")
    assert (found.max_steps, found.per_device_train_batch_size) == (40, 3)
    assert found.get_warmup_steps(40) == 10
    assert found.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert (found.seed, found.max_grad_norm, found.report_to) == (7, 0.5, [])
