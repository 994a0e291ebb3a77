"""What ranks say to each other in a step: the gradient, and nothing else."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.dist.conftest import Job


def counted(run: Job, hook: str, *flags: str) -> dict[str, Any]:
    agent = run.start("--trainer.devices=2", *flags, hook=hook)
    assert agent.wait() == 0, agent.said
    told = [json.loads((run.folder / f"collectives-{rank}").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    return told[0]


@pytest.mark.parametrize(
    "more",
    [
        ["--model.net=tests.dist.nets:large"],
        [
            "--model.net=tests.dist.nets:large",
            "--model.ema_decay=0.99",
            "--optim.name=sgd",
            "--trainer.gradient_clip_val=1",
        ],
        ["--model.net=tests.dist.nets:normed"],
    ],
    ids=["adam", "sgd-ema-clip", "batchnorm"],
)
def test_a_quiet_step_sends_its_gradient_only(job: Callable[..., Job], more: list[str]) -> None:
    often = ("--run.checkpoint_every_steps=100", "--data.global_batch_size=4")
    ours = counted(job(*often, *more), "counting")
    assert ours["buckets"] == (1 if "--model.net=tests.dist.nets:normed" in more else 2)
    assert ours["counts"] == {"c10d::allreduce_": ours["steps"] * ours["buckets"]}


def test_parts_of_a_step_send_nothing(job: Callable[..., Job]) -> None:
    """With 2 parts, the gradient travels once a step and not once a part."""
    flags = ["--data.global_batch_size=4", "--trainer.accumulate_grad_batches=2"]
    net = ("--model.net=tests.dist.nets:large", "--run.checkpoint_every_steps=100")
    ours = counted(job(*net, *flags), "counting")
    assert ours["counts"] == {"c10d::allreduce_": ours["steps"] * ours["buckets"]}


def test_lightning_as_it_comes_sends_more(job: Callable[..., Job], capsys) -> None:
    """The number beside ours, by the same counter: or that would count nothing but gradients."""
    stock = counted(job(), "stock")
    sent = sum(stock["counts"].values()) / stock["steps"]
    with capsys.disabled():
        print(f"\ncollectives a step: ours {stock['buckets']}, stock Lightning {sent:.1f}")
    assert sent > stock["buckets"]
