"""Names of the axes a signal can run along, and of the splits, written down once."""

from enum import StrEnum


class Axis(StrEnum):
    """What one row of a signal stands for; a pair is a query and a key that it may see."""

    TOKEN = "token"
    EXAMPLE = "example"
    PAIR = "pair"


TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
"""The splits, in the order that gives their codes in the store."""
