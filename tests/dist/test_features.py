"""Features of a net's head on several processes."""

from collections.abc import Callable

import torch

from tests.dist.conftest import Job

STEP = ["--optim.name=sgd", "--optim.momentum=0", "--optim.lr=0.1", "--trainer.max_steps=3"]
FROZEN = [*STEP, "--model.freeze=backbone", "--data.crop_padding_px=0", "--data.flip=false"]


def fitted(run: Job, hook: str, devices: int) -> dict[str, torch.Tensor]:
    agent = run.start(f"--trainer.devices={devices}", hook=hook)
    assert agent.wait() == 0, agent.said
    on_features = "--model.freeze backbone: features are computed once" in agent.said
    assert on_features == (hook == "plain"), agent.said
    return run.weights()


def test_features_of_a_frozen_backbone_reach_every_process(job: Callable[..., Job]) -> None:
    """Where one process refuses the head, all train on images; the result is the same."""
    more = ["--trainer.max_steps=12"]  # the set is seen whole
    alone = fitted(job(*FROZEN, *more), "plain", 1)
    shared = fitted(job(*FROZEN, *more), "plain", 2)
    refused = fitted(job(*FROZEN, *more), "refusing", 2)
    for name, value in alone.items():
        assert torch.allclose(value, shared[name], rtol=0, atol=1e-5), name
        assert torch.allclose(value, refused[name], rtol=0, atol=1e-5), name


def test_a_head_that_one_process_refuses_ends_all(job: Callable[..., Job]) -> None:
    run = job(*STEP, "--model.head_init=features")
    agent = run.start("--trainer.devices=2", hook="refusing")
    assert agent.wait() == 78, agent.said
    assert "rank 1 refuses the head" in agent.said


def test_processes_compare_the_features_that_are_kept(job: Callable[..., Job]) -> None:
    """Those of the head's fit, before training on them."""
    flags = [*FROZEN, "--trainer.max_steps=12", "--model.head_init=features"]
    alone, shared = (fitted(job(*flags), "plain", devices) for devices in (1, 2))
    for name, value in alone.items():
        assert torch.allclose(value, shared[name], rtol=0, atol=1e-4), name
