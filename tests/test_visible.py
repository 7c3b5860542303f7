"""What others wrote is shown without being obeyed."""

import pytest

from pipeline.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\0b\x07\x7f", "a␀b␇␡"),
        ("one\r\ntwo\rthree\tfour\n", "one\ntwo␍three\tfour\n"),
        ("\x9b31m \u202eevil\u202c \ud800", "�31m �evil� �"),
        ("é 中 العربية 👩‍👩‍👧 [red]", "é 中 العربية 👩‍👩‍👧 [red]"),
    ],
)
def test_controls_are_symbols_and_nothing_else_is_changed(text, shown):
    assert visible(text) == shown
    visible(text).encode()
