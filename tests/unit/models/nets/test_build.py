"""Nets by name: what is built, which weights are taken, and how each mistake is told."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from lightship.errors import ConfigError
from lightship.models.nets.build import build_net, check_training
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


@pytest.fixture
def stored_resnet(tmp_path):
    torch.manual_seed(1)
    state = torchvision.models.resnet18(num_classes=5).state_dict()
    path = tmp_path / "resnet.pt"
    torch.save(state, path)
    return str(path), state


def test_weights_of_the_same_classes_are_all_taken(stored_resnet) -> None:
    url, state = stored_resnet
    loaded = build_net("resnet18", 5, 32, weights=url).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_weights_of_other_classes_leave_the_last_layer_new(stored_resnet) -> None:
    url, state = stored_resnet
    torch.manual_seed(2)
    fresh = build_net("resnet18", 9, 32).state_dict()
    torch.manual_seed(2)
    loaded = build_net("resnet18", 9, 32, weights=url).state_dict()
    for key in loaded:
        expected = fresh if key.startswith("fc.") else state
        assert torch.equal(loaded[key], expected[key])


def test_weights_from_a_checkpoint_of_ours(tmp_path, stored_resnet) -> None:
    _, state = stored_resnet
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"net.{key}": value for key, value in state.items()}}, path)
    loaded = build_net("resnet18", 5, 32, weights=str(path)).state_dict()
    assert torch.equal(loaded["conv1.weight"], state["conv1.weight"])


def test_published_layouts_of_old_are_understood(tmp_path) -> None:
    """As the published files: auxiliary heads, norm.1 in DenseNet, no BatchNorm counters."""
    old = torchvision.models.densenet121(num_classes=5).state_dict()
    spelled = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for key, value in old.items()
        if not key.endswith("num_batches_tracked")
    }
    assert spelled.keys() - old.keys()
    torch.save(spelled, tmp_path / "densenet.pt")
    loaded = build_net("densenet121", 5, 32, weights=str(tmp_path / "densenet.pt")).state_dict()
    key = "features.denseblock1.denselayer1.conv2.weight"
    assert torch.equal(loaded[key], old[key])

    full = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    torch.save(full.state_dict(), tmp_path / "googlenet.pt")
    loaded = build_net("googlenet", 5, 64, weights=str(tmp_path / "googlenet.pt")).state_dict()
    assert torch.equal(loaded["fc.weight"], full.state_dict()["fc.weight"])


def test_weights_of_another_net_are_refused_by_key(stored_resnet) -> None:
    url, _ = stored_resnet
    with pytest.raises(ConfigError, match=r"layer1\.2\.conv1\.weight is missing.* more"):
        build_net("resnet34", 5, 32, weights=url)
    with pytest.raises(ConfigError, match=r"does not fit --model\.net resnet50: size mismatch"):
        build_net("resnet50", 5, 32, weights=url)


def test_weights_that_would_run_code_are_refused(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"fc.weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ConfigError, match="needs code to be unpickled"):
        build_net("litcnn", 5, 32, weights=str(tmp_path / "trap.pt"))
    assert not (tmp_path / "sprung").exists()


def test_weights_that_are_no_state_dict(tmp_path) -> None:
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ConfigError, match="not a PyTorch file"):
        build_net("litcnn", 5, 32, weights=str(tmp_path / "text.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds a list, not a dictionary"):
        build_net("litcnn", 5, 32, weights=str(tmp_path / "list.pt"))
    with pytest.raises(ConfigError, match="no published weights"):
        build_net("litcnn", 5, 32, weights="default")


def test_default_weights_have_an_address_for_every_torchvision_net() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) > 50
    for name in names:
        assert torchvision.models.get_model_weights(name).DEFAULT.url.startswith("https://")


def test_every_net_is_a_module() -> None:
    assert isinstance(build_net("litcnn", 2, 16), nn.Module)
