"""Numbers read as written out here."""

import pytest

from pipeline.report import words


@pytest.mark.parametrize(
    ("shown", "want"),
    [
        (words.number(None), "–"),
        (words.number(1234.567), "1,234.57"),
        (words.whole(1234567), "1,234,567"),
        (words.percent(0.8004), "80.0%"),
        (words.times(3.56), "3.6×"),
        (words.times(250), "250×"),
        (words.count(620_000), "620 K"),
        (words.count(2_212_352), "2.21 M"),
        (words.count(999_600), "1.00 M"),
        (words.count(12), "12"),
        (words.data(0), "0 B"),
        (words.data(374), "374 B"),
        (words.data(3270), "3.27 kB"),
        (words.data(13e12), "13 TB"),
        (words.seconds(0.00312), "3.12 ms"),
        (words.seconds(2.31), "2.31 s"),
        (words.seconds(188), "3 min 08 s"),
        (words.seconds(12000), "3 h 20 min"),
        (words.number(-0.1234, 3), "−0.123"),
        (words.number(-0.0001, 2), "0.00"),
        (words.probability(0.0004), "< 0.001"),
        (words.probability(0.0495), "0.050"),
    ],
)
def test_numbers_as_people_read_them(shown, want):
    assert shown == want


def test_small_counts_are_spelled():
    assert [words.spelled(value) for value in (0, 2, 9, 10)] == ["no", "two", "nine", "10"]
