"""Projectors from the student's width to the teacher's, by name.

A projector is declared in this file, or in another package that gives it by an entry point of the
group `decant.projectors`.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.registry import Registry
from pipeline.student.losses.lazy_torch import torch

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Projector:
    """A projector with its name in `params.yaml`.

    Attributes:
        name: The name.
        build: Takes the student's and the teacher's width and returns a module that takes states of
            the one, [*rows, d_student], to the other. It gets them in the precision of its weights,
            which are drawn from torch's random generator: seed that first.
    """

    name: str
    build: Callable[[int, int], "nn.Module"]


PROJECTORS: Registry[Projector] = Registry(
    "projector",
    package="pipeline.student.align.projectors",
    group="decant.projectors",
    name_of=lambda value: value.name if isinstance(value, Projector) else None,
)


def projector(name: str) -> Callable[[Callable[[int, int], "nn.Module"]], Projector]:
    """Declare the function below as a projector."""
    return lambda build: Projector(name, build)


@projector("linear")
def linear(d_student: int, d_teacher: int) -> "nn.Module":
    """Return an affine map."""
    return torch.nn.Sequential(OrderedDict(linear=torch.nn.Linear(d_student, d_teacher)))
