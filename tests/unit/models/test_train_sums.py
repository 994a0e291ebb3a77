"""Sums of training steps: the same however they are cut, and a step costs next to nothing."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightship.data.batch import NOT_COUNTED, Batch
from lightship.models.train_sums import TrainSums

ROWS, CLASSES = 6, 5
PIXELS = torch.zeros(ROWS, 3, 4, 4)


def step(seed: int, mixed: bool = False) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, CLASSES, generator=generator, requires_grad=True)
    labels = torch.randint(-1, CLASSES, (ROWS,), generator=generator)
    batch = Batch(PIXELS, labels, torch.arange(ROWS))
    if mixed:
        weight = torch.rand(ROWS, generator=generator)
        batch = batch._replace(mixed_labels=labels.roll(1), mix_weight=weight)
    return logits.sum() * 7, logits, batch


def by_hand(steps: list) -> list[float]:
    loss = hits = count = 0.0
    for total, logits, batch in steps:
        loss += total.item()
        guesses = logits.argmax(1)
        for row in range(ROWS):
            if batch.labels[row] == NOT_COUNTED:
                continue
            count += 1
            share = 1.0 if batch.mix_weight is None else batch.mix_weight[row].item()
            hits += share * (guesses[row] == batch.labels[row]).item()
            if batch.mixed_labels is not None:
                hits += (1 - share) * (guesses[row] == batch.mixed_labels[row]).item()
    return [loss, hits, count]


@pytest.mark.parametrize("steps", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("mixed", ["none", "all", "some"])
def test_sums_are_those_made_by_hand(steps: int, mixed: str) -> None:
    taken = [step(k, {"none": False, "all": True, "some": k % 3 == 0}[mixed]) for k in range(steps)]
    sums = TrainSums()
    assert sums.value() is None
    for each in taken:
        sums.add(*each)
    assert sums.value().tolist() == pytest.approx(by_hand(taken), rel=1e-6)
    sums.restart()
    assert sums.value() is None


def test_looking_at_the_sums_changes_no_bit_of_them() -> None:
    """A save does: a run that was killed must write the metrics of one that was not."""
    whole, cut = TrainSums(), TrainSums()
    for k in range(90):
        whole.add(*step(k))
        cut.add(*step(k))
        if k % 7 == 0:
            kept = cut.value().clone()
            cut.restart(kept)
    assert torch.equal(whole.value(), cut.value())


def test_a_step_is_one_operation_and_keeps_no_pixels() -> None:
    sums, steps = TrainSums(), [step(k) for k in range(33)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for each in steps[:31]:
            sums.add(*each)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts.pop("aten::argmax") == 31
    assert set(counts) <= {"aten::detach", "detach", "aten::view", "aten::as_strided"}
    assert all(tensor is not PIXELS for one in sums._steps for tensor in one.batch)
    assert not any(one.loss.requires_grad for one in sums._steps)
    sums.add(*steps[31])
    assert sums._steps == [], "added up, so that no step's tensors pile up"
