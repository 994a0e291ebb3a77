"""Nets by name: what is built, and how each mistake is told."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from lightship.errors import ConfigError
from lightship.models.nets.build import build_net, check_training, skeleton
from lightship.models.nets.litcnn import litcnn


def test_litcnn_is_the_tutorials_net() -> None:
    net = litcnn(10, 32)
    parts = [(type(part).__name__, *(list(p.shape) for p in part.parameters())) for part in net]
    assert parts == [
        ("Conv2d", [32, 3, 3, 3], [32]),
        ("ReLU",),
        ("Conv2d", [32, 32, 3, 3], [32]),
        ("ReLU",),
        ("MaxPool2d",),
        ("Conv2d", [64, 32, 3, 3], [64]),
        ("ReLU",),
        ("Conv2d", [64, 64, 3, 3], [64]),
        ("ReLU",),
        ("MaxPool2d",),
        ("Flatten",),
        ("Linear", [512, 1600], [512]),
        ("ReLU",),
        ("Linear", [128, 512], [128]),
        ("ReLU",),
        ("Linear", [10, 128], [10]),
    ]


@pytest.mark.parametrize("size_px", [16, 17, 19, 28, 33])
def test_litcnn_takes_every_size_from_the_smallest(size_px: int) -> None:
    assert litcnn(3, size_px)(torch.zeros(2, 3, size_px, size_px)).shape == (2, 3)


def test_litcnn_says_the_smallest_size() -> None:
    with pytest.raises(ConfigError, match=r"not 15.*--data\.image_size_px 16"):
        litcnn(3, 15)


@pytest.mark.parametrize(
    ("name", "size_px"),
    [
        ("litcnn", 20),
        ("resnet18", 32),
        ("squeezenet1_1", 64),
        ("googlenet", 64),
        ("mobilenet_v3_small", 32),
        ("vit_b_32", 64),
    ],
)
def test_nets_come_with_the_asked_classes_in_training_mode(name: str, size_px: int) -> None:
    net = build_net(name, 7, size_px)
    assert net.training
    output = net(torch.zeros(2, 3, size_px, size_px))
    assert isinstance(output, torch.Tensor)  # no auxiliary outputs, in training mode either
    assert output.shape == (2, 7)


def test_building_moves_no_random_numbers_but_the_weights() -> None:
    torch.manual_seed(0)
    torchvision.models.mobilenet_v3_small(num_classes=4)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_net("mobilenet_v3_small", 4, 32)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_name_meets_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"'resnet19'.*resnet1"):
        build_net("resnet19", 10, 32)
    with pytest.raises(ConfigError, match=r"package\.module:function"):
        build_net("qqqqqq", 10, 32)


@pytest.mark.parametrize(
    ("name", "size_px"), [("vgg11", 16), ("vit_b_32", 50), ("maxvit_t", 50), ("alexnet", 32)]
)
def test_an_unsuitable_size_is_told_before_training(name: str, size_px: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*{size_px} px.*--data\.image_size_px"):
        build_net(name, 10, size_px)


@pytest.fixture
def own_nets(tmp_path, monkeypatch):
    """A module of nets in the working directory, as a user has it."""
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def good(n): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, n))\n"
        "def wide(n): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, n + 1))\n"
        "def text(n): return 'net'\n"
        "def pair(n):\n"
        "    class Pair(nn.Module):\n"
        "        def forward(self, x): return x, x\n"
        "    return Pair()\n"
        "def empty(n): return nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())\n"
        "def small(n): return nn.Sequential(nn.Flatten(), nn.Linear(5, n))\n"
        "class Two(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        return (y, y) if self.training else y\n"
        "def two(n): return Two(*good(n))\n"
    )
    (tmp_path / "needs_absent.py").write_text("import absent_package_of_mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.usefixtures("own_nets")
def test_own_net() -> None:
    assert build_net("my_nets:good", 3, 8)(torch.zeros(5, 3, 8, 8)).shape == (5, 3)


@pytest.mark.usefixtures("own_nets")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_nets:wide", r"gave \[2, 4\].*\[2, 3\]"),
        ("my_nets:pair", r"gave a tuple.*\[2, 3\]"),
        ("my_nets:text", r"returned a str.*torch\.nn\.Module"),
        ("my_nets:goof", r"no function 'goof'; did you mean good"),
        ("my_nots:good", r"no module 'my_nots'"),
        ("my_nets:empty", r"no parameters"),
        ("my_nets:small", r"8 px \(mat1 and mat2"),
        ("my_nets:", r"expected package\.module:function"),
        (".my_nets:good", r"expected package\.module:function"),
    ],
)
def test_own_net_that_does_not_fit(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_net(name, 3, 8)


@pytest.mark.parametrize(
    ("name", "size_px", "least"),
    [("resnet18", 32, 2), ("resnet18", 64, 1), ("mobilenet_v3_small", 32, 2), ("litcnn", 32, 1)],
)
def test_one_image_at_a_time_is_refused_where_batchnorm_has_single_values(
    name: str, size_px: int, least: int
) -> None:
    net = build_net(name, 3, size_px)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    random_state = torch.random.get_rng_state()
    for batch_size in range(1, 4):
        if batch_size >= least:
            check_training(net, name, batch_size, size_px)
            continue
        with pytest.raises(ConfigError) as refused:
            check_training(net, name, batch_size, size_px)
        for flag in ("--data.global_batch_size", "devices", "--trainer.accumulate_grad_batches"):
            assert flag in str(refused.value)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert net.training


@pytest.mark.usefixtures("own_nets")
def test_a_net_whose_training_gives_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="gives a tuple in training"):
        check_training(build_net("my_nets:two", 3, 8), "my_nets:two", 4, 8)


@pytest.mark.usefixtures("own_nets")
def test_what_an_own_net_lacks_is_not_taken_for_the_net() -> None:
    with pytest.raises(ModuleNotFoundError, match="absent_package_of_mine"):
        build_net("needs_absent:build", 3, 8)


def test_every_net_is_a_module() -> None:
    assert isinstance(build_net("litcnn", 2, 16), nn.Module)


@pytest.mark.parametrize("name", ["litcnn", "speednet", "resnet18", "vit_b_32", "maxvit_t"])
def test_a_skeleton_has_the_shapes_of_the_net_and_no_memory(name: str) -> None:
    bare = skeleton(name, 7, 224)
    assert bare is not None
    assert {tensor.device.type for tensor in bare.values()} == {"meta"}
    whole = build_net(name, 7, 224).state_dict()
    assert {k: v.shape for k, v in bare.items()} == {k: v.shape for k, v in whole.items()}
    skeleton("litcnn", 10**6, 4096)  # 16 TB if it were allocated


def test_a_net_without_a_skeleton_says_so() -> None:
    assert skeleton("regnet_y_400mf", 7, 224) is None
