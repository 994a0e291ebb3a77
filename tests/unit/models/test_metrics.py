"""Evaluation counts what torchmetrics counts, never padding, and never waits for the device."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch.profiler import ProfilerActivity, profile
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from lightship.data.batch import NOT_COUNTED
from lightship.models.metrics import MAX_CONFUSION_CLASSES, EvalMetrics


def random_batches(num_classes: int, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(num_classes)
    return [(torch.randn(n, num_classes), torch.randint(num_classes, (n,))) for n in sizes]


@pytest.mark.parametrize("num_classes", [2, 5, 6, 40])
def test_equal_to_torchmetrics(num_classes: int) -> None:
    batches = random_batches(num_classes, [64, 64, 17])
    ours = EvalMetrics(num_classes, with_confusion=True)
    accuracy = MulticlassAccuracy(num_classes, average="micro")
    per_class = MulticlassAccuracy(num_classes, average=None)
    top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
    confusion, f1 = MulticlassConfusionMatrix(num_classes), MulticlassF1Score(num_classes)
    for logits, labels in batches:
        ours.update(logits, labels)
        for theirs in (accuracy, per_class, top5, confusion, f1):
            theirs.update(logits, labels)
    results = ours.compute()
    assert results["acc"].item() == pytest.approx(accuracy.compute().item(), abs=1e-7)
    assert results["f1"].item() == pytest.approx(f1.compute().item(), abs=1e-6)
    seen = results["support"] > 0  # torchmetrics says 0 for a class that never came, ours NaN
    ours_per_class = results["per_class_acc"].float()
    torch.testing.assert_close(ours_per_class[seen], per_class.compute()[seen])
    assert ours_per_class[~seen].isnan().all()
    assert torch.equal(results["confusion"], confusion.compute())
    assert results["num_samples"] == 145
    assert torch.equal(results["support"], results["confusion"].sum(1))
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    torch.testing.assert_close(
        results["loss"], F.cross_entropy(logits.double(), labels), atol=1e-6, rtol=0
    )
    assert ("top5" in results) == (num_classes > 5)
    if num_classes > 5:
        assert results["top5"].item() == pytest.approx(top5.compute().item(), abs=1e-7)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_means_over_classes_are_those_of_scikit_learn() -> None:
    """Of 6 classes 3 has no sample but a prediction, 4 a sample and no prediction, 5 neither."""
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 4])
    guesses = torch.tensor([0, 0, 0, 0, 1, 3, 1, 1, 0, 2, 0])
    metrics = EvalMetrics(6)
    metrics.update(F.one_hot(guesses, 6).float(), labels)
    results = metrics.compute()
    assert results["balanced_acc"].item() == pytest.approx((4 / 6 + 2 / 3 + 1 + 0) / 4)
    f1 = (2 * 4 / (6 + 6) + 2 * 2 / (3 + 3) + 1 + 0 + 0) / 5
    assert results["f1"].item() == pytest.approx(f1)
    assert balanced_accuracy_score(labels, guesses) == pytest.approx((4 / 6 + 2 / 3 + 1) / 4)
    assert f1_score(labels, guesses, average="macro") == pytest.approx(f1)


def test_padding_never_counts_whatever_it_holds() -> None:
    ((logits, labels),) = random_batches(12, [50])
    plain = EvalMetrics(12, with_confusion=True)
    plain.update(logits, labels)
    padded = EvalMetrics(12, with_confusion=True)
    junk = torch.full((30, 12), float("nan"))
    junk[:10] = 1e30
    padded.update(torch.cat([logits[:20], junk]), F.pad(labels[:20], (0, 30), value=NOT_COUNTED))
    padded.update(torch.cat([junk, logits[20:]]), F.pad(labels[20:], (30, 0), value=NOT_COUNTED))
    expected, results = plain.compute(), padded.compute()
    assert expected.keys() == results.keys()
    for key, value in expected.items():
        torch.testing.assert_close(results[key], value, rtol=1e-12, atol=0, equal_nan=True)


def test_broken_logits_do_not_look_good() -> None:
    metrics = EvalMetrics(10)
    metrics.update(torch.full((8, 10), float("nan")), torch.full((8,), 9))
    results = metrics.compute()
    assert results["loss"].isnan()
    assert results["acc"] == 0
    assert results["top5"] < 1 or torch.full((10,), float("nan")).topk(5).indices.max() == 9


def test_nothing_counted_is_nan_not_zero() -> None:
    metrics = EvalMetrics(3)
    metrics.update(torch.zeros(4, 3), torch.full((4,), NOT_COUNTED))
    results = metrics.compute()
    assert results["num_samples"] == 0
    for name in ("acc", "balanced_acc", "f1", "loss"):
        assert results[name].isnan()


def test_loss_sum_keeps_small_terms() -> None:
    """A float32 sum of 2**25 ones and more would stop growing."""
    metrics = EvalMetrics(2)
    metrics.loss_sum = torch.tensor(2.0**25)
    logits, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    for _ in range(100):
        metrics.update(logits, labels)
    assert metrics.loss_sum.item() - 2.0**25 == pytest.approx(69.3147, abs=1e-3)


def test_ranks_are_summed_once_and_own_sums_kept() -> None:
    """Two metrics stand for two ranks: the sum of a state is that of both."""
    whole, *ranks = EvalMetrics(7, True), EvalMetrics(7, True), EvalMetrics(7, True)
    for rank, (logits, labels) in zip(ranks, random_batches(7, [30, 41]), strict=True):
        rank.update(logits, labels)
        whole.update(logits, labels)
    names = iter(["loss_sum", "support", "hits", "predictions", "top5_hits", "confusion"])
    ranks[0].sum_over_ranks = lambda state: state.add_(getattr(ranks[1], next(names)))
    expected, results = whole.compute(), ranks[0].compute()
    for key, value in expected.items():
        torch.testing.assert_close(results[key], value, rtol=1e-12, atol=0)
    assert ranks[0].support.sum() == 30  # torchmetrics puts the rank's own sums back


def test_a_large_confusion_matrix_is_left_out() -> None:
    metrics = EvalMetrics(MAX_CONFUSION_CLASSES + 1, with_confusion=True)
    metrics.update(torch.randn(4, MAX_CONFUSION_CLASSES + 1), torch.arange(4))
    assert "confusion" not in metrics.compute()


def test_update_is_static_and_never_waits() -> None:
    metrics = EvalMetrics(20, with_confusion=True)
    batches = random_batches(20, [16] * 5)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for logits, labels in batches:
            metrics.update(logits, labels)
    counts = {event.key: event.count for event in recorded.key_averages()}
    assert counts["aten::scatter_add_"] == 20  # the profiler did see the updates
    for waiting in ("aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::item"):
        assert waiting not in counts


def test_update_runs_where_nothing_can_be_read() -> None:
    """A meta tensor has shapes and no values: what depends on a value raises."""
    metrics = EvalMetrics(20, with_confusion=True).to("meta")
    metrics.update(torch.randn(16, 20, device="meta"), torch.zeros(16, device="meta").long())
    assert metrics.compute()["acc"].is_meta


def test_state_is_no_part_of_a_checkpoint() -> None:
    assert EvalMetrics(4, with_confusion=True).state_dict() == {}
