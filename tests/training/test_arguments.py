"""What `Trainer` is told."""

from pipeline.training.arguments import training_arguments, warmup_steps
from pipeline.training.options import TrainOptions


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
    assert (found.optim, found.bf16, found.fp16) == ("adamw_torch_fused", False, False)


def test_a_single_step_has_no_warm_up_that_would_leave_it_no_rate(tmp_path):
    found = training_arguments(TrainOptions(warmup=0.05), tmp_path, "cpu")
    assert [warmup_steps(found, steps) for steps in (1, 2, 40)] == [0, 1, 2]


def test_half_precisions_and_optimisers_are_those_of_trainer(tmp_path):
    found = [
        training_arguments(TrainOptions(precision=precision, optimizer=name), tmp_path, "cpu")
        for precision, name in (("bfloat16", "adafactor"), ("float16", "adamw_8bit"))
    ]
    assert [(one.bf16, one.fp16) for one in found] == [(True, False), (False, True)]
    assert [one.optim for one in found] == ["adafactor", "adamw_bnb_8bit"]


def test_what_a_teachers_head_holds_does_not_travel_at_every_step(tmp_path):
    assert training_arguments(TrainOptions(), tmp_path, "cpu").ddp_broadcast_buffers is False
