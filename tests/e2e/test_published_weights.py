"""A recipe that starts from published weights, by the command, from a mirror on this machine."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, save

from lightship.cli import main
from lightship.models.nets import published
from tests.support.images import little_set, put
from tests.support.runs import last_state
from tests.support.site import Site, without_other_sources

NET = "test_efficientnet"  # 0.4 M parameters, in stages as the recipe's own net


def command(tmp_path: Path) -> list[str]:
    """The recipe on a user's images, with a net and a length that suit a test."""
    root = put(str(tmp_path / "images"), little_set(("train", "val", "test"), per_class=8))
    flags = ["--config=finetune", f"--data.root={root}", f"--run.output={tmp_path / 'run'}"]
    flags += ["--run.tracking=none", "--run.log_images=0"]
    return ["fit", *flags, f"--model.net=timm:{NET}", "--trainer.max_epochs=1"]


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "LIGHTSHIP_WEIGHTS_MIRROR"])
def test_the_recipe_fetches_its_weights_once(
    variable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    without_other_sources(tmp_path, monkeypatch)
    host, _, path = published.addresses(f"timm:{NET}")[0].partition("://")[2].partition("/")
    place = path if variable == "HF_ENDPOINT" else f"{host}/{path}"
    with Site(tmp_path / "site") as site:
        monkeypatch.setenv(variable, site.url)
        weights = save(timm.create_model(NET, num_classes=1000).state_dict())
        site.put(place, weights)
        assert main(command(tmp_path)) == 0
        assert site.gets == [place]
        shown = capsys.readouterr().err
        assert f"downloading weights: {site.url}/{place}" in shown
        assert "classifier.weight, classifier.bias are new (3 classes)" in shown
    assert published.fetch(f"timm:{NET}")[0] == weights, "from the cache: the site is gone"
    trained = last_state(str(tmp_path / "run"))["state_dict"]
    for name, value in load(weights).items():
        if name.startswith(("conv_stem.", "blocks.0.")):  # frozen by the recipe
            assert torch.equal(trained[f"net.{name}"], value), name


def test_without_a_site_the_error_says_how_to_give_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_other_sources(tmp_path, monkeypatch)
    with Site(tmp_path / "site") as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
    assert main(command(tmp_path)) == 74
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "cannot be" in line)
    assert f"the weights of timm:{NET} cannot be downloaded" in line
    assert "give a file or URL as --model.weights, or a copy of the site as " in line
    assert "LIGHTSHIP_WEIGHTS_MIRROR" in line
