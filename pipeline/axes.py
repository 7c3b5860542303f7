"""Names of the axes a signal can run along, and of the splits, written down once."""

from enum import StrEnum


class Axis(StrEnum):
    """What one row of a signal stands for."""

    TOKEN = "token"
    EXAMPLE = "example"


TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
"""The splits, in the order that gives their codes in the store."""
