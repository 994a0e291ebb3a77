"""What each evaluated image came to, and what the report makes of it."""

from pathlib import Path

import numpy as np
import torch

from lightship.config import DataConfig
from lightship.data.batch import NOT_COUNTED, Batch
from lightship.data.module import ImageData
from lightship.data.splits import load_splits
from lightship.models.classifier import ImageClassifier
from lightship.models.outcomes import COLUMNS, Outcomes
from lightship.report.error_analysis import find_mistakes
from tests.support.images import little_set, put


def batch(ids: list[int], labels: list[int]) -> Batch:
    images = torch.zeros(len(ids), 3, 8, 8, dtype=torch.uint8)
    return Batch(images, torch.tensor(labels), torch.tensor(ids))


def scores(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_outcomes_leave_padding_out_and_start_anew() -> None:
    outcomes = Outcomes()
    outcomes.add(batch([4, 5], [0, 1]), scores([0.7, 0.3], [0.6, 0.4]))
    outcomes.add(batch([6, NOT_COUNTED], [1, NOT_COUNTED]), scores([0.1, 0.9], [0.5, 0.5]))
    rows = outcomes.take()
    assert tuple(rows) == COLUMNS
    assert rows["id"].tolist() == [4, 5, 6]
    assert rows["guess"].tolist() == [0, 0, 1]
    np.testing.assert_allclose(rows["probability"], [0.7, 0.6, 0.9], rtol=1e-6)
    np.testing.assert_allclose(rows["loss"], -np.log([0.7, 0.4, 0.9]), rtol=1e-5)
    assert len(outcomes.take()["id"]) == 0


def test_an_output_that_is_not_finite_is_the_least_sure_and_the_worst() -> None:
    outcomes = Outcomes()
    outcomes.add(batch([4, 5], [1, 1]), torch.tensor([[torch.nan] * 2, [0.0, -torch.inf]]))
    rows = outcomes.take()
    assert rows["probability"].tolist() == [0.0, 1.0]
    assert rows["loss"].tolist() == [np.inf, np.inf]


def test_it_finds_the_mistakes_and_the_calibration(tmp_path: Path) -> None:
    put(str(tmp_path), little_set(["train"], per_class=6, size_px=(16, 16)))
    config = DataConfig(root=str(tmp_path), global_batch_size=4, val_fraction=0.0)
    data = ImageData(config, load_splits(config, None, "train"), 0, 1)
    data.prepare("train")
    names = data.class_names
    model = ImageClassifier(net="litcnn", class_names=names, image_size_px=data.image_size_px,
                            mean=[0.5] * 3, std=[0.5] * 3)  # fmt: skip
    labels = data.manifests["train"].label.astype(np.int64)
    shares = np.full((len(labels), len(names)), 0.1 / (len(names) - 1), np.float32)
    shares[np.arange(len(labels)), labels] = 0.9
    wrong = int(np.flatnonzero(labels == 0)[2])
    shares[wrong] = 0.02 / (len(names) - 1)
    shares[wrong, 1] = 0.98  # surely taken for class 1
    log_shares = torch.from_numpy(shares).log()
    everything = Batch(torch.empty(0), torch.from_numpy(labels), torch.arange(len(labels)))
    model.outcomes.add(everything, log_shares)
    model.evaluation.update(log_shares, everything.labels)
    model.eval_metrics = model.evaluation.compute()
    found = find_mistakes(model, data, "train")
    first = found["hardest"][0]
    assert (first.true, first.guess) == (names[0], names[1])
    assert first.path == data.manifests["train"].name(wrong)
    assert np.array_equal(first.image, data.images("train", np.array([wrong]))[wrong])
    [pair] = found["confused"]
    assert (pair.true, pair.guess, pair.count) == (names[0], names[1], 1)
    assert [shown.path for shown in pair.examples] == [first.path]
    right = [6, 6, 6]
    right[0] -= 1
    assert found["class_support"] == [6] * 3
    np.testing.assert_allclose(found["class_acc"], np.array(right) / 6)
    calibration = found["calibration"]
    assert sum(calibration.count) == len(labels)
    others = len(labels) - 1
    # The right ones were 0.9 sure and always right, the wrong one 0.98 sure: two bins.
    np.testing.assert_allclose(calibration.error, (0.1 * others + 0.98) / len(labels), rtol=1e-5)
