"""What a training does between steps and epochs beside training."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.stream import StoreDataset


class Pins(TrainerCallback):
    """Stops a run whose signals are no longer those it was started with."""

    def __init__(self, dataset: StoreDataset) -> None:
        self._reader = dataset.reader

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare, without reading a value.

        Raises:
            IncompatibleError: If a signal was captured anew, or the store is another.
            IntegrityError: If a signal or the store is gone.
        """
        self._reader.check_pins()


class Epochs(TrainerCallback):
    """Tells the order which epoch begins, and the dataset what to read ahead.

    The epoch is counted in steps, as `Trainer` itself does when it resumes. It hands epochs on
    too, but not through every wrapper of a sampler.
    """

    def __init__(self, order: BatchOrder, dataset: StoreDataset) -> None:
        self._order = order
        self._dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which epoch it is, and when it needs which segment."""
        steps = -(-len(self._order) // args.gradient_accumulation_steps)
        epoch = state.global_step // steps
        self._order.set_epoch(epoch)
        is_last = (epoch + 1) * steps >= state.max_steps
        then = [] if is_last else self._order.next_segments()
        self._dataset.follow(self._order.timetable(), then)
