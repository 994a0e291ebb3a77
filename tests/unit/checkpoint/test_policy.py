"""What a kill may lose: counted against a writer of any speed, and with any steps set."""

import pytest

from lightship.checkpoint import policy
from lightship.checkpoint.policy import CheckpointPolicy


class Run:
    """Training whose saves take `write_steps` steps, each step a second; counts what a kill costs.

    Attributes:
        lost: The most steps between what is durable and what is done, at any moment.
        waits: Steps after which training had to wait for a save.
        saves: Steps that were saved.
    """

    def __init__(
        self, bound: CheckpointPolicy, write_steps: int, steps: int, start: int = 0
    ) -> None:
        self.lost = self.waits = 0
        self.saves: list[int] = []
        in_flight, durable = None, start
        peer = CheckpointPolicy(bound.steps, bound.seconds)  # of a process that writes nothing

        def keep_within(step: int) -> None:
            nonlocal in_flight, durable
            written = in_flight is not None and step - in_flight >= write_steps
            may_block = peer.may_be_reached(step) or bound.steps is None  # all agree at these steps
            assert peer.may_be_reached(step) == bound.may_be_reached(step)
            if in_flight is not None and not written and may_block and bound.is_reached(step):
                self.waits += 1
                written = True
            if written:
                durable, in_flight = in_flight, None
            if in_flight is None:
                bound.save_durable()
            peer.save_durable()
            if peer.may_be_reached(step):
                assert in_flight is None
                bound.all_durable()
                peer.all_durable()

        bound.start(start)
        peer.start(start)
        for step in range(start + 1, start + steps + 1):
            clock_s[0] += 1
            self.lost = max(self.lost, step - durable)
            keep_within(step)
            if bound.is_due(step) or bound.is_late():
                self.saves.append(step)
                durable = durable if in_flight is None else in_flight  # one at most in flight
                in_flight = step
                bound.save_begun(step)
                peer.save_begun(step)
                keep_within(step)


clock_s = [0.0]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy.time, "monotonic", lambda: clock_s[0])


@pytest.mark.parametrize("write_steps", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("every", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("start", [0, 3])
def test_no_more_than_the_set_steps_are_lost(every: int, write_steps: int, start: int) -> None:
    run = Run(CheckpointPolicy(every, None), write_steps, 60, start)
    assert run.lost <= every
    assert all(step % ((every + 1) // 2) == 0 for step in run.saves)


@pytest.mark.parametrize("write_steps", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("every_s", [2.0, 3.0, 7.0, 10.0])
def test_no_more_than_the_set_seconds_and_a_step_are_lost(every_s: float, write_steps: int) -> None:
    assert Run(CheckpointPolicy(None, every_s), write_steps, 60).lost <= every_s + 1


def test_a_save_faster_than_half_the_bound_is_never_waited_for() -> None:
    for write_steps in (1, 4, 5):
        assert Run(CheckpointPolicy(10, None), write_steps, 60).waits == 0
        assert Run(CheckpointPolicy(None, 10), write_steps, 60).waits == 0
    assert Run(CheckpointPolicy(10, None), 6, 60).waits > 0


def test_without_a_bound_nothing_is_saved_or_waited_for() -> None:
    run = Run(CheckpointPolicy(None, None), 1000, 60)
    assert run.saves == []
    assert run.waits == 0
