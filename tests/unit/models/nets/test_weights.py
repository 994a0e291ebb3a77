"""Weights: what each kind of file gives, and what of it fits the net."""

import copy
import functools
import itertools
import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save
from torch import Tensor, nn

from lightship.errors import ConfigError
from lightship.models.nets import weights
from lightship.models.nets.build import build_net
from lightship.models.nets.structure import head_parameters
from lightship.models.nets.weights import Weights, load_weights, read_weights
from tests.support.bounded_child import call_bounded
from tests.support.own_nets import twenty_blocks

SIZE_PX, CLASSES = 32, 5
COUNT = 122
"""Tensors of `twenty_blocks`, 20 of them counters of BatchNorm."""
NET = "blocks"
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightship")


@pytest.fixture(scope="module")
def stored() -> State:
    torch.manual_seed(1)
    return twenty_blocks(CLASSES).state_dict()


@functools.cache
def fresh_net(net: str, classes: int) -> nn.Module:
    return twenty_blocks(classes) if net == NET else build_net(net, classes, SIZE_PX)


def names(count: int) -> list[str]:
    return [f"class{number}" for number in range(count)]


def load(path: Path, classes: int = CLASSES, net: str = NET) -> State:
    module = copy.deepcopy(fresh_net(net, classes))
    load_weights(module, net, read_weights(net, str(path)), names(classes))
    return module.state_dict()


def write(path: Path, content: Any) -> Path:
    path.write_bytes(save(content)) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


FILES = {
    "bare": lambda state: state,
    "lightning": lambda state: {"epoch": 3, "state_dict": state, "lr": [0.1], "none": None},
    "script": lambda state: {"model_state_dict": state, "optimizer": {"state": {}}},
    "torchvision's": lambda state: {
        "model": state,
        "args": Namespace(lr=0.5, data="x"),
        "epoch": 1,
    },
    "twice": lambda state: {"model": {"state_dict": state}},
}
PREFIXES = [
    "", "net.", "model.", "module.", "backbone.", "_orig_mod.", "module._orig_mod.",
    "_orig_mod.module.model.net.backbone.", "state_dict.", "model_ema.module.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", [*FILES, "safetensors"])
def test_every_kind_of_file_with_every_prefix(
    kind: str, prefix: str, stored: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {f"{prefix}{key}": value for key, value in stored.items()}
    if kind == "safetensors":
        path = write(tmp_path / "w.safetensors", state)
    else:
        path = write(tmp_path / "w.pth", FILES[kind](state))
    loaded = load(path)
    assert all(torch.equal(loaded[key], stored[key]) for key in loaded)
    assert f"{path}: loaded {COUNT} of {COUNT} tensors" in caplog.text
    assert "new" not in caplog.text


def without(*keys: str):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def changed(key: str, change):
    return lambda state: {**state, key: change(state[key])}


CONV = "block3.conv.weight"
HEAD = "fc.weight, fc.bias are new (9 classes)"
PARTS = ("conv.weight", "bn.weight", "bn.bias")
FITS = {
    "all": (lambda state: state, f"loaded {COUNT - 2} of {COUNT} tensors; {HEAD}"),
    "without a head": (without("fc.weight", "fc.bias"), f"loaded 120 of 122 tensors; {HEAD}"),
    "a head of another width": (
        lambda state: {**state, "fc.weight": torch.zeros(7, 6), "fc.bias": torch.zeros(7)},
        f"loaded 120 of 122 tensors; {HEAD}",
    ),
    "a head of another name": (
        lambda state: {**without("fc.weight", "fc.bias")(state), "head.weight": torch.zeros(2, 2)},
        f"{HEAD}; not used: head.weight",
    ),
    "one missing": (without(CONV), f"loaded 119 of 122 tensors; {HEAD}"),
    "one more": (
        lambda state: {**state, "extra.weight": torch.zeros(3)}, f"{HEAD}; not used: extra.weight"
    ),
    "no counters": (
        lambda state: {key: v for key, v in state.items() if "num_batches" not in key},
        f"loaded 100 of 102 tensors; {HEAD}",
    ),
    "half precision": (
        lambda state: {key: v.half() if v.is_floating_point() else v for key, v in state.items()},
        f"loaded 120 of 122 tensors; {HEAD}",
    ),
    "bfloat16": (
        lambda state: {
            key: v.bfloat16() if v.is_floating_point() else v for key, v in state.items()
        },
        f"loaded 120 of 122 tensors; {HEAD}",
    ),
    "double": (changed(CONV, Tensor.double), f"loaded 120 of 122 tensors; {HEAD}"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", FITS)
def test_what_nearly_fits_is_loaded_and_said(
    case: str, suffix: str, stored: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, line = FITS[case]
    state = change(stored)
    fresh = fresh_net(NET, 9).state_dict()
    loaded = load(write(tmp_path / f"w{suffix}", state), classes=9)
    for key, value in loaded.items():
        if key.startswith("fc."):
            assert value.abs().max() < 0.1, "a new head is near zero"
        else:
            expected = state.get(key, fresh[key])
            assert torch.equal(value, expected.to(value.dtype)), key
        assert value.dtype == fresh[key].dtype
    assert line in caplog.text
    lacks = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lacks) == (case == "one missing")
    assert all(f"lacks {CONV}: random values" in record.message for record in lacks)


REFUSED = {
    "a wrong shape": (
        changed(CONV, lambda value: value[:4]),
        rf"does not fit --model\.net blocks: {CONV} is \[4, 8, 3, 3\], .*\[8, 8, 3, 3\]",
    ),
    "quantized": (
        changed(CONV, lambda value: value.mul(100).to(torch.int8)), rf"{CONV} is torch\.int8"
    ),
    "complex": (changed(CONV, lambda value: value.to(torch.complex64)), rf"{CONV} is torch\.compl"),
    "a tenth missing": (
        without(
            *(f"block{n}.{part}" for n in (1, 2, 3) for part in PARTS)
        ),
        r"block1\.conv\.weight is missing; .*; .* and 6 more",
    ),
    "a tenth too much": (
        lambda state: {**state, **{f"more.{n}": torch.zeros(2) for n in range(12)}},
        r"more\.\d+ is not of this net; .*; .* and 9 more",
    ),
    "another net": (
        lambda state: {f"features.{n}": value for n, value in enumerate(state.values())},
        r"block0\.conv\.weight is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(
    case: str, suffix: str, stored: State, tmp_path: Path
) -> None:
    change, message = REFUSED[case]
    content = {key: value.contiguous() for key, value in change(stored).items()}
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / f"w{suffix}", content))


def test_weights_of_a_larger_or_smaller_net_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pt", torchvision.models.resnet18(num_classes=CLASSES).state_dict())
    with pytest.raises(ConfigError, match=r"resnet34: layer1\.2\.conv1\.weight is missing.* more"):
        load(path, net="resnet34")
    with pytest.raises(
        ConfigError, match=r"resnet50: .* is \[64, 64, 3, 3\], the net's is \[64, 64"
    ):
        load(path, net="resnet50")
    path = write(tmp_path / "w.pt", torchvision.models.resnet34(num_classes=CLASSES).state_dict())
    with pytest.raises(ConfigError, match=r"resnet18: layer1\.2\.conv1\.weight is not of this net"):
        load(path, net="resnet18")


def test_averaged_weights_are_preferred(stored: State, tmp_path: Path) -> None:
    """As torchvision's and timm's scripts store both."""
    average = {f"module.{key}": value + 1 for key, value in stored.items()}
    average["n_averaged"] = torch.tensor(7)
    path = write(tmp_path / "w.pth", {"model": stored, "model_ema": average})
    assert torch.equal(load(path)[CONV], stored[CONV] + 1)


def test_a_backbone_alone_fits_a_net_that_wraps_it(
    stored: State, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = twenty_blocks(CLASSES)
            self.backbone.fc = nn.Identity()
            self.head = nn.Linear(8, 3)

    net = Wrapped()
    load_weights(net, "wrapped", Weights("file", stored, {}), names(3))
    assert torch.equal(net.state_dict()[f"backbone.{CONV}"], stored[CONV])
    line = "loaded 120 of 122 tensors; head.weight, head.bias are new (3 classes); not used"
    assert f"{line}: backbone.fc.weight, backbone.fc.bias" in caplog.text


def test_published_layouts_of_old_are_understood(tmp_path: Path) -> None:
    """As the published files: auxiliary heads, norm.1 in DenseNet, a ViT's older names."""
    old = torchvision.models.densenet121(num_classes=5).state_dict()
    spelled = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for key, value in old.items()
        if not key.endswith("num_batches_tracked")
    }
    assert spelled.keys() - old.keys()
    loaded = load(write(tmp_path / "densenet.pt", spelled), net="densenet121")
    key = "features.denseblock1.denselayer1.conv2.weight"
    assert torch.equal(loaded[key], old[key])

    full = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    module = build_net("googlenet", 5, 64)
    path = write(tmp_path / "googlenet.pt", full.state_dict())
    load_weights(module, "googlenet", read_weights("googlenet", str(path)), names(5))
    assert torch.equal(module.state_dict()["fc.weight"], full.state_dict()["fc.weight"])

    vit = torchvision.models.vit_b_32(num_classes=5, image_size=32).state_dict()
    renamed = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in vit.items()
    }
    assert renamed.keys() - vit.keys()
    loaded = load(write(tmp_path / "vit.pt", renamed), net="vit_b_32")
    assert all(torch.equal(loaded[key], vit[key]) for key in vit)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors", ".bin"])
@pytest.mark.parametrize("nested", [False, True])
def test_files_that_would_run_code_are_refused_whatever_their_name(
    suffix: str, nested: bool, stored: State, tmp_path: Path
) -> None:
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / f"w{suffix}"
    torch.save({"state_dict": stored, "args": Trap()} if nested else {"fc": Trap()}, path)
    with pytest.raises(ConfigError, match="needs code to be unpickled"):
        load(path)
    assert not (tmp_path / "sprung").exists()


def test_files_without_weights(tmp_path: Path, stored: State) -> None:
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ConfigError, match="not a PyTorch file"):
        load(tmp_path / "text.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ConfigError, match="it is empty"):
        load(tmp_path / "empty.pt")
    with pytest.raises(ConfigError, match="holds a list, not a dictionary"):
        load(write(tmp_path / "list.pt", [1, 2]))
    with pytest.raises(ConfigError, match=r"holds no state dict .*but student, teacher"):
        load(write(tmp_path / "pair.pt", {"student": stored, "teacher": stored}))
    recursive: dict[str, Any] = {}
    recursive["model"] = recursive
    with pytest.raises(ConfigError, match="holds a dict that holds itself"):
        load(write(tmp_path / "recursive.pt", recursive))


@pytest.mark.parametrize("end", [8, 100, 5000, -1])
def test_a_torn_safetensors_file_is_refused(end: int, stored: State, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(save(stored)[:end])
    with pytest.raises(ConfigError, match=r"safetensors file|not a PyTorch file"):
        load(path)


def safetensors_file(name: str, dtype: str, shape: list[int], size_bytes: int) -> bytes:
    """A file of one tensor of zeros."""
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size_bytes]}
    header = json.dumps({name: tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size_bytes)


@pytest.mark.parametrize(
    ("dtype", "shape", "size_bytes"),
    [("F4", [8], 4), ("F8_E8M0", [8], 8), ("F32", [0, 2**63], 0), ("F32", [0, 2**62, 2**62], 0)],
)
def test_a_safetensors_file_of_what_torch_does_not_know_is_refused(
    dtype: str, shape: list[int], size_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors_file("a", dtype, shape, size_bytes))
    with pytest.raises(ConfigError, match=r"w\.safetensors cannot be read as a safetensors file"):
        load(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("pos_embed", [3]), ("pos_embed", [1, 11, 192]), ("patch_embed.proj.weight", [192, 7])],
)
def test_tensors_on_which_the_code_of_timm_fails_are_refused(name: str, shape: list[int]) -> None:
    pytest.importorskip("timm")
    net = "timm:vit_tiny_patch16_224"
    module = build_net(net, 2, 32)
    state = module.state_dict() | {name: torch.zeros(shape)}
    with pytest.raises(ConfigError, match=r"^w does not fit --model\.net timm:vit.*timm fails"):
        load_weights(module, net, Weights("w", state, {}), names(2))


def test_a_net_of_timm_takes_its_weights_at_another_image_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    published = timm.create_model("deit_tiny_patch16_224")
    with torch.no_grad():
        published.pos_embed.uniform_(-1, 1)
    path = write(tmp_path / "w.safetensors", published.state_dict())
    net = "timm:deit_tiny_patch16_224"
    module = build_net(net, 4, 64)
    load_weights(module, net, read_weights(net, str(path)), names(4))
    loaded_by_timm = timm.create_model(
        "deit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        img_size=64,
        num_classes=4,
    )
    assert torch.equal(module.pos_embed, loaded_by_timm.pos_embed)
    assert torch.equal(module.blocks[3].attn.qkv.weight, published.blocks[3].attn.qkv.weight)
    assert "head.weight, head.bias are new (4 classes)" in caplog.text


def test_a_file_larger_than_memory_is_not_read(tmp_path) -> None:
    with (tmp_path / "sparse.pth").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(ConfigError, match=r"sparse\.pth has 4,398,046,511,104 bytes"):
        read_weights("litcnn", str(tmp_path / "sparse.pth"))


def test_thousands_of_prefixes_are_not_all_tried() -> None:
    """Each pair of prefixes takes a pass over all names."""
    words = ["model", "module", "net", "backbone", "_orig_mod"]
    names = {".".join([*way, "x"]): torch.ones(1) for way in itertools.product(words, repeat=4)}
    names |= {f"module.net.{number}": torch.ones(1) for number in range(9)}
    prefixes = weights._prefixes(names)
    assert len(prefixes) == 32
    assert {"", "module.", "module.net."} <= set(prefixes)


def prefixes_of(name: str) -> list[str]:
    return weights._prefixes({name: torch.ones(1)})


def test_a_name_of_thousands_of_wrappers_costs_no_memory() -> None:
    """A text for each prefix takes 800 MB."""
    outcome = call_bounded(prefixes_of, "net." * 20_000 + "w", max_mib=30)
    assert outcome.result == ["net." * count for count in range(9)]


def test_a_new_head_starts_near_zero_and_a_loaded_one_as_it_was(
    stored: State, tmp_path: Path
) -> None:
    path = write(tmp_path / "w.pth", stored)
    new = load(path, classes=9)
    assert 0.005 < new["fc.weight"].std() < 0.015
    assert not new["fc.bias"].any()
    assert torch.equal(load(path)["fc.weight"], stored["fc.weight"])


def of_classes(class_names: list[str], state: State) -> Weights:
    return Weights("w.ckpt", state, {"class_names": class_names})


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        (["ant", "bee", "cat"], "loaded 122 of 122 tensors"),
        (["cat", "ant", "bee"], "122 tensors; the rows of its last layer are put into the order"),
        (["ant", "bee", "dog"], "fc.bias are new (3 classes); its last layer is of other classes"),
        (["ant", "bee", "cat", "dog"], "fc.weight, fc.bias are new (3 classes)"),
    ],
)
def test_the_head_of_a_checkpoint_follows_its_class_names(
    theirs: list[str], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, net, stored = ["ant", "bee", "cat"], twenty_blocks(3), twenty_blocks(len(theirs))
    load_weights(net, "own", of_classes(theirs, stored.state_dict()), ours)
    assert line in caplog.text
    for row, name in enumerate(ours):
        if set(theirs) == set(ours):
            assert torch.equal(net.fc.weight[row], stored.fc.weight[theirs.index(name)])
            assert net.fc.bias[row] == stored.fc.bias[theirs.index(name)]
    if set(theirs) != set(ours):
        assert float(net.fc.weight.detach().abs().max()) < 0.1
        assert not net.fc.bias.any()
    assert torch.equal(net.get_parameter(CONV), stored.get_parameter(CONV))


def test_rows_that_are_not_clearly_classes_are_new() -> None:
    """With as many features as classes."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    state = {"2.weight": torch.ones(3, 3), "2.bias": torch.ones(3)}
    with pytest.raises(ConfigError, match=r"2\.weight is missing"):  # nothing else is there
        load_weights(net, "own", of_classes(["b", "a", "c"], state), ["a", "b", "c"])


HEADS = {
    "caformer_s18": ("head.fc.fc1.", "head.fc.norm.", "head.fc.fc2."),
    "levit_128s": ("head.bn.", "head.linear.", "head_dist.bn.", "head_dist.linear."),
    "repvit_m0_9": ("head.head.bn.", "head.head.l.", "head.head_dist.bn.", "head.head_dist.l."),
    "iformer_t": ("head.head.bn.", "head.head.l."),
    "crossvit_9_240": ("head.0.", "head.1."),
    "efficientvim_m1": ("heads.0.", "heads.1.", "heads.2.", "heads.3."),
    "sequencer2d_s": ("head.fc.",),
    "volo_d1_224": ("head.", "aux_head."),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_several_layers_is_fitted_to_other_classes(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What does not depend on the number of classes is loaded."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        published, net = (timm.create_model(name, num_classes=count) for count in (9, 3))
    head = {key for key in net.state_dict() if key.startswith(HEADS[name])}
    assert {key for key in head if key in dict(net.named_parameters())} == {*head_parameters(net)}
    state = {key: torch.ones(each.shape) for key, each in published.state_dict().items()}
    net = net.to_empty(device="cpu")
    load_weights(net, f"timm:{name}", Weights("w.pth", state, {}), names(3))
    for key, value in net.state_dict().items():
        is_new = value.shape != state[key].shape
        assert is_new == (key in head and 3 in value.shape), key
        assert is_new or bool((value == 1).all()), key
        assert not (is_new and key.endswith("bias") and value.any())
    assert "new (3 classes)" in caplog.text


def test_a_file_without_a_head_leaves_its_hidden_layers_as_they_are_initialized() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("caformer_s18", num_classes=3)
    before = copy.deepcopy(net.head.fc)
    state = {key: value for key, value in net.state_dict().items() if "head.fc" not in key}
    load_weights(net, "timm:caformer_s18", Weights("w.pth", state, {}), names(3))
    assert torch.equal(net.head.fc.fc1.weight, before.fc1.weight)
    assert bool((net.head.fc.norm.weight == 1).all())
    assert not torch.equal(net.head.fc.fc2.weight, before.fc2.weight)
