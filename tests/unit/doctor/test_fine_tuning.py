"""What `doctor` and `--print_config` say of a checkpoint that a fit starts from."""

import logging
from pathlib import Path

import pytest
import torch

from lightship.config import Config
from lightship.doctor.fine_tuning import plan
from tests.support.little_fit import CLASSES, classifier


@pytest.mark.parametrize(("are_names", "line"), [(True, "of other classes"), (False, "loaded")])
def test_only_names_are_compared_with_those_of_a_checkpoint(
    are_names: bool, line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lightship")
    model = classifier()
    content = {"hyper_parameters": dict(model.hparams), "state_dict": model.state_dict()}
    torch.save({"lightship": {}, **content}, tmp_path / "w.ckpt")
    config = Config()
    config.model.net, config.model.weights = "litcnn", str(tmp_path / "w.ckpt")
    assert "head" in plan(config, [str(number) for number in range(len(CLASSES))], are_names)
    assert line in caplog.text
    assert ("are new" in caplog.text) == are_names
