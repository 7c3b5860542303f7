"""Students of one teacher are compared with each other, and with many each with the best."""

from pipeline.report.compare import compare
from pipeline.report.pairs import pairs_of
from tests.report.examples import student, teacher


def test_few_students_are_all_compared_within_their_teacher():
    students = [
        student("a"),
        student("b", of="wide"),
        student("c"),
        student("d"),
        student("e", of="wide"),
    ]
    comparison = compare([teacher(), teacher("wide")], students)
    assert pairs_of(comparison) == [("a", "c"), ("a", "d"), ("c", "d"), ("b", "e")]


def test_many_students_are_each_compared_with_the_best():
    students = [student(f"s{number}", 90.0 - number) for number in range(9)]
    pairs = pairs_of(compare([teacher()], students))
    assert pairs == [("s8", f"s{number}") for number in range(8)]


def test_one_student_has_nobody_to_be_compared_with():
    assert pairs_of(compare([teacher()], [student("a")])) == []
