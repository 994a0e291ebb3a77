"""Sizes of training images by the epoch."""

import pytest

from lightship.data.size_schedule import SizeSchedule


@pytest.mark.parametrize(
    ("sizes", "epochs", "expected"),
    [
        ([128], 2, [128, 128]),
        ([128, 160], 4, [128, 128, 160, 160]),
        ([128, 160], 5, [128, 128, 160, 160, 160]),
        ([96, 128, 160], 4, [96, 128, 160, 160]),
        ([96, 128, 160], 3, [96, 128, 160]),
        ([96, 128, 160], 1, [160]),
    ],
)
def test_parts_are_equally_long(sizes: list[int], epochs: int, expected: list[int]) -> None:
    schedule = SizeSchedule(sizes, epochs)
    assert [schedule.at(epoch) for epoch in range(epochs)] == expected
    assert schedule.at(epochs) == sizes[-1], "a run that is trained further keeps the last"
    for epoch in range(epochs):
        end = schedule.end_of_size(epoch)
        assert {expected[other] for other in range(epoch, end)} == {expected[epoch]}
        assert end == epochs or expected[end] != expected[epoch]
