"""Checkpoints of a student's training: all that decides how it goes on, to the bit."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from pipeline.student.align.distiller import Distiller
from pipeline.student.loop.random_state import RandomState
from pipeline.training.checkpoints import begin_after, check_room, mark_complete
from pipeline.training.values import StepValues

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.pt", "trainer_state.json"


class Checkpoints:
    """Writes and reads `checkpoint-STEP`.

    Args:
        directory: The checkpoints of this run.
        distiller: Student and projectors.
        optimizer: Their optimiser.
        schedule: Of its learning rate.
        accelerator: Its gradient scaler, and the ranks: each has files of its own.
        pins: Signal to digest, what the student learns from.
    """

    def __init__(
        self,
        directory: Path,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        accelerator: Accelerator,
        *,
        pins: Mapping[str, str],
    ) -> None:
        self._directory, self._distiller, self._pins = directory, distiller, pins
        self._accelerator = accelerator
        parts = {"optimizer": optimizer, "schedule": schedule, "scaler": accelerator.scaler}
        self._parts = {name: part for name, part in parts.items() if part is not None}

    def load(self, checkpoint: Path | None, state: TrainerState, values: StepValues) -> None:
        """Take up a checkpoint, if there is one, and make room for those to come.

        Args:
            checkpoint: Where it is.
            state: Receives how far it is, and its log.
            values: Receives what no point of the curve holds yet.

        Raises:
            ResourceError: If there is no room.
        """
        if checkpoint is not None:
            load_model(self._distiller, str(checkpoint / WEIGHTS))
            parts = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(parts[name])
            rank = self._accelerator.process_index
            values.load(checkpoint / f"values_{rank}.safetensors", self._accelerator.device)
            RandomState.load(checkpoint / f"random_{rank}.pt").restore()
            saved = TrainerState.load_from_json(str(checkpoint / STATE))
            state.global_step, state.epoch = saved.global_step, saved.epoch
            state.log_history = saved.log_history
        if state.global_step < state.max_steps and self._accelerator.is_main_process:
            self._directory.mkdir(parents=True, exist_ok=True)
            begin_after(self._directory, checkpoint)
            check_room(self._directory, self._distiller, state)

    def save(self, state: TrainerState, values: StepValues) -> None:
        """Write the checkpoint of this step; on several ranks all must call this."""
        checkpoint = self._directory / f"checkpoint-{state.global_step}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        rank = self._accelerator.process_index
        if self._accelerator.is_main_process:
            # `save_model` knows tied weights. No object is pickled.
            save_model(self._distiller, str(checkpoint / WEIGHTS))
            parts = {name: part.state_dict() for name, part in self._parts.items()}
            torch.save(parts, checkpoint / OPTIMIZER)
            state.save_to_json(str(checkpoint / STATE))
        values.save(checkpoint / f"values_{rank}.safetensors")
        RandomState.now().save(checkpoint / f"random_{rank}.pt")
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            mark_complete(checkpoint, self._pins)
