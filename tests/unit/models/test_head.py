import pytest
import torch
from torch import nn

from lightship.errors import ConfigError
from lightship.models.head import Head, evaluation_mode
from lightship.models.nets.build import build_net

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Filters(nn.Sequential):
    """A net whose head is a 1x1 filter before the pooling."""

    def __init__(self, *last: nn.Module) -> None:
        head = nn.Conv2d(4, 5, 1)
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), head, *last)


class Averaged(nn.Module):
    """Two heads of different width whose outputs count `first` and `second`."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)
        self.head, self.head_dist = nn.Linear(4, 5), nn.Linear(3, 5)
        self.shares = first, second

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        one = self.head(self.pool(self.stem(images)).flatten(1))
        return self.shares[0] * one + self.shares[1] * self.head_dist(self.pool(images).flatten(1))


@pytest.mark.parametrize(
    "net",
    [
        Averaged(0.5, 0.5),
        build_net("resnet18", 5, 32),
        build_net("litcnn", 5, 32),
        Filters(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ],
    ids=["averaged", "resnet18", "litcnn", "filters"],
)
def test_logits_are_the_heads_of_the_features(net: nn.Module) -> None:
    head = Head(net, "it", "--flag")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [part.training for part in net.modules()]
    with evaluation_mode(net):
        head.check(PIXELS)
        expected = net(PIXELS)
        torch.testing.assert_close(head.logits(head.features(PIXELS)), expected)
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    weight, bias = torch.ones(5, head.width), torch.arange(5.0)
    head.set(weight, bias)
    torch.testing.assert_close(
        head.logits(torch.ones(1, weight.shape[1])), weight.sum(1)[None] + bias
    )


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            Filters(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "something follows its last Conv2d",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.LogSoftmax(1)),
            "something follows its last Linear",
        ),
        (nn.Sequential(nn.Conv2d(3, 5, 32), nn.Flatten()), "its head is Conv2d"),
        (Averaged(0.5, 0.4), "something follows its last Linear"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5, bias=False)),
            "its head is Linear",
        ),
        (nn.Sequential(nn.Flatten(2), nn.Linear(32 * 32, 5)), "its head gets [3, 3, 1024]"),
    ],
)
def test_other_nets_are_refused(net: nn.Module, message: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"--flag needs .* --model.net it does not") as caught,
        evaluation_mode(net),
    ):
        Head(net, "it", "--flag").check(PIXELS)
    assert message in str(caught.value)


def test_a_head_of_zeros_hides_nothing() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.ReLU())
    for each in net.parameters():
        nn.init.zeros_(each)
    with pytest.raises(ConfigError, match="something follows"), evaluation_mode(net):
        Head(net, "it", "--flag").check(PIXELS)
    assert not any(each.any() for each in net.parameters())
