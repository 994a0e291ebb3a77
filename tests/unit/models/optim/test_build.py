"""Optimizers move what they should, Muon is Muon, and rates are functions of the step."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightship.models.optim import build as optim
from lightship.models.optim import muon
from lightship.models.optim.build import SGDPart, build_optimizer, build_schedule, lr_scale
from lightship.models.optim.muon import Muon, orthogonalize
from lightship.models.optim.xla import TracedOptimizer


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()),
        *(nn.Linear(4 * 16, 12), nn.ReLU(), nn.Linear(12, 3)),
    )


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(16, 3, 12, 12, generator=generator)
        labels = (images.mean((1, 2, 3)) > 0).long()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


ALL = ["adam", "adamw", "sgd", "muon", "muon-sgd"]


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_learns(name: str) -> None:
    net = small_net()
    lr = 0.05 if name == "sgd" else 3e-3
    losses = train(net, build_optimizer(net, name, lr=lr), range(60))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_optimizer_goes_on_bit_for_bit(name: str) -> None:
    straight = small_net()
    train(straight, build_optimizer(straight, name, lr=1e-3, weight_decay=0.1), range(6))

    net = small_net()
    optimizer = build_optimizer(net, name, lr=1e-3, weight_decay=0.1)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = small_net()
    resumed.load_state_dict(weights)
    again = build_optimizer(resumed, name, lr=1e-3, weight_decay=0.1)
    again.load_state_dict(state)
    train(resumed, again, range(3, 6))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_only_matrices_and_filters_decay(name: str) -> None:
    net = small_net()
    before = copy.deepcopy(net)
    optimizer = build_optimizer(net, name, lr=0.1, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before.parameters(), net.parameters(), strict=True):
        assert torch.equal(old, new) == (old.ndim < 2)


@pytest.mark.parametrize("name", ALL)
def test_each_parameter_is_in_one_group_and_frozen_ones_in_none(name: str) -> None:
    net = small_net()
    net[3].requires_grad_(False)
    optimizer = build_optimizer(net, name, weight_decay=0.1)
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_adam_is_the_tutorials() -> None:
    ours, theirs = small_net(), small_net()
    train(ours, build_optimizer(ours), range(5))
    train(theirs, torch.optim.Adam(theirs.parameters(), lr=2e-4, fused=True), range(5))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_fused_kernels_are_used_here_and_can_be_refused() -> None:
    for name in ALL:
        for fused in (True, False):
            groups = build_optimizer(small_net(), name, fused=fused).param_groups
            assert {bool(group["fused"]) for group in groups if "fused" in group} == {fused}


def test_muon_takes_what_lies_between_first_layer_and_classifier() -> None:
    net = small_net()
    optimizer = build_optimizer(net, "muon")
    moved = {
        id(p) for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]
    }
    assert moved == {id(net[i].weight) for i in (3, 5, 7, 9)}


def test_muon_leaves_embeddings_and_takes_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 16), layer, nn.Linear(16, 3))
    optimizer = build_optimizer(net, "muon")
    moved = {
        id(p) for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]
    }
    attention = layer.self_attn
    expected = [attention.in_proj_weight, attention.out_proj.weight]
    expected += [layer.linear1.weight, layer.linear2.weight]
    assert moved == {id(p) for p in expected}


def test_muon_is_torchs_muon_on_matrices() -> None:
    torch.manual_seed(3)
    start = [torch.randn(24, 40), torch.randn(24, 40), torch.randn(40, 24)]
    grads = [[torch.randn_like(matrix) for matrix in start] for _ in range(4)]
    moved = []
    for kind in ("ours", "theirs"):
        params = [nn.Parameter(matrix.clone()) for matrix in start]
        optimizer: torch.optim.Optimizer
        if kind == "ours":
            group = {"params": params, "orthogonal": True, "weight_decay": 0.1}
            optimizer = Muon([group], lr=0.02, momentum=0.9)
        else:
            optimizer = torch.optim.Muon(
                params, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            )
        for step_grads in grads:
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        moved.append(params)
    for matrix, ours, theirs in zip(start, *moved, strict=True):
        # torch's iterates in bfloat16 everywhere, ours in float32 on a CPU.
        assert (ours - theirs).norm() < 0.02 * (theirs - matrix).norm()


def test_muon_moves_the_rest_as_adamw() -> None:
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": list(ours.parameters()), "orthogonal": False, "weight_decay": 0.1}]
    pair = Muon(groups, lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(4):
        for net, optimizer in zip((ours, theirs), pair, strict=True):
            optimizer.zero_grad()
            net(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


class Whitened(nn.Module):
    """A frozen first layer with a bias, filters of two shapes, shifts, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first = nn.Conv2d(3, 6, 2)
        self.first.weight.requires_grad_(False)
        self.convs = nn.Sequential(
            *(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU()),
            *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU()),
            *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU()),
        )
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.convs(nn.functional.gelu(self.first(images))).mean((2, 3)))


REST = SGDPart(lr=0.03, head_lr=0.2, momentum=0.8, early_fraction=0.5)


def test_muon_sgd_is_torchs_sgd_and_the_records_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch.optim.SGD, and Muon in airbench94_muon's own formulas, one filter at a time."""
    monkeypatch.setattr(muon.devices, "has_bf16_units", lambda device: False)
    net, plain = Whitened(), Whitened()
    optimizer = build_optimizer(net, "muon-sgd", lr=0.1, momentum=0.6, weight_decay=0.01, rest=REST)
    filters = [p for p in plain.convs.parameters() if p.ndim == 4]
    others = [plain.first.bias, *(p for p in plain.convs.parameters() if p.ndim == 1)]
    theirs = torch.optim.SGD(
        [
            {"params": others, "lr": 0.03, "weight_decay": 0.01 / 0.03},
            {"params": [plain.head.weight], "lr": 0.2, "weight_decay": 0.01 / 0.2},
        ],
        momentum=0.8,
        nesterov=True,
    )
    momenta = [torch.zeros_like(p) for p in filters]

    class Separate:
        def zero_grad(self) -> None:
            plain.zero_grad()

        @torch.no_grad()
        def step(self) -> None:
            theirs.step()
            for weight, momentum in zip(filters, momenta, strict=True):
                momentum.mul_(0.6).add_(weight.grad)
                direction = weight.grad.add(momentum, alpha=0.6)
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                x = direction.flatten(1)
                x = x / (x.norm() + 1e-7)
                for _ in range(3):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                weight.sub_(0.1 * x.view_as(weight))

    train(net, optimizer, range(4))
    train(plain, Separate(), range(4))
    before = Whitened()
    assert torch.equal(before.first.weight, net.first.weight)
    for name, moved in net.named_parameters():
        other = dict(plain.named_parameters())[name]
        if moved.requires_grad:
            assert not torch.equal(moved, dict(before.named_parameters())[name]), name
        torch.testing.assert_close(moved, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_what_compiles_its_steps_moves_weights_alike(name: str, monkeypatch) -> None:
    """The optimizer for XLA, run here, against the one for everything else."""
    monkeypatch.setattr(muon.devices, "has_bf16_units", lambda device: False)
    settings = {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.01, "rest": REST}
    net, other = Whitened(), Whitened()
    train(net, build_optimizer(net, name, **settings), range(4))
    monkeypatch.setattr(optim.devices.Device, "compiles_steps", True)
    traced = build_optimizer(other, name, **settings)
    assert isinstance(traced, TracedOptimizer)
    train(other, traced, range(4))
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-3, atol=1e-4)


def test_only_the_bias_of_a_frozen_first_layer_ends_early() -> None:
    net = Whitened()
    optimizer = build_optimizer(net, "muon-sgd", lr=0.1, rest=REST)
    schedule = build_schedule(optimizer, 20, "linear", 0.0, 0.05)
    rates = []
    for _ in range(20):
        rates.append({id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]})
        optimizer.step()
        schedule.step()
    early = [rate[id(net.first.bias)] for rate in rates]
    assert early == pytest.approx([0.03 * max(0.0, 1 - step / 10) for step in range(20)])
    head = [rate[id(net.head.weight)] for rate in rates]
    assert head == pytest.approx([0.2 * (1 - step / 20) for step in range(20)])
    with_weights = small_net()
    groups = build_optimizer(with_weights, "muon-sgd", rest=REST).param_groups
    assert not any("ends_at" in group for group in groups)


def test_filters_are_moved_as_matrices_in_any_memory_order() -> None:
    torch.manual_seed(4)
    start, grad = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    moved = []
    for shape, layout in (
        ((8, 36), torch.contiguous_format),
        ((8, 4, 3, 3), torch.contiguous_format),
        ((8, 4, 3, 3), torch.channels_last),
    ):
        param = nn.Parameter(start.reshape(shape).clone(memory_format=layout))
        param.grad = grad.reshape(shape).clone(memory_format=layout)
        Muon([{"params": [param], "orthogonal": True, "weight_decay": 0.0}], lr=0.1).step()
        moved.append(param.detach().reshape(8, 36))
    assert (moved[0] - start.reshape(8, 36)).norm() > 0.1
    torch.testing.assert_close(moved[1], moved[0])
    torch.testing.assert_close(moved[2], moved[0])


@pytest.mark.parametrize(("in_bf16", "rounding"), [(False, 1e-3), (True, 0.03)])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 10, 64), (2, 64, 10)])
def test_orthogonalize_keeps_directions_and_evens_lengths(
    shape: tuple[int, int, int], in_bf16: bool, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon.devices, "has_bf16_units", lambda device: in_bf16)
    torch.manual_seed(5)
    matrices = torch.randn(shape)
    result = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ result @ right.mT
    singular = inner.diagonal(dim1=1, dim2=2)
    assert singular.min() > 0.3
    assert singular.max() < 1.3
    assert (inner - torch.diag_embed(singular)).abs().max() < rounding
    for index in range(shape[0]):  # the batch is only a batch
        torch.testing.assert_close(orthogonalize(matrices[index : index + 1])[0], result[index])


@given(
    st.integers(1, 5000),
    st.floats(0, 0.99),
    st.sampled_from(["constant", "cosine", "linear"]),
    st.floats(0, 1),
)
def test_lr_scale_rises_to_the_peak_and_ends_at_the_final_share(
    total: int, warmup_fraction: float, schedule: str, final: float
) -> None:
    warmup = round(warmup_fraction * total)
    steps = sorted({0, warmup // 2, max(0, warmup - 1), warmup, (warmup + total) // 2, total - 1})
    values = [lr_scale(step, total, warmup, schedule, final) for step in steps]
    assert all(0 <= value <= 1 for value in values)
    assert values[0] > 0 or (total == 1 and final == 0) or warmup == 0
    rising = [v for s, v in zip(steps, values, strict=True) if s < warmup]
    falling = [v for s, v in zip(steps, values, strict=True) if s >= warmup]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup < total - 1:
        assert lr_scale(warmup, total, warmup, schedule, final) == pytest.approx(1)
        last = 1 if schedule == "constant" else final
        assert lr_scale(total - 1, total, warmup, schedule, final) == pytest.approx(last)


def test_lr_scale_values() -> None:
    assert [lr_scale(step, 100, 4) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert lr_scale(5, 11, 0, "linear", 0.0) == pytest.approx(0.5)
    assert lr_scale(5, 11, 0, "cosine", 0.2) == pytest.approx(0.6)
    assert lr_scale(2, 13, 0, "cosine") == pytest.approx((1 + math.cos(math.pi / 6)) / 2)
    assert lr_scale(500, 11, 0, "linear", 0.1) == pytest.approx(0.1)
    assert lr_scale(10**9, math.inf) == 1.0


def test_the_schedule_is_the_function_and_resumes() -> None:
    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = build_optimizer(small_net(), "sgd", lr=0.5)
        return optimizer, build_schedule(optimizer, 10, "cosine", 0.2, 0.1)

    optimizer, schedule = build()
    for step in range(6):
        assert optimizer.param_groups[0]["lr"] == 0.5 * lr_scale(step, 10, 2, "cosine", 0.1)
        optimizer.step()
        schedule.step()
    other, resumed = build()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    resumed.step()
    assert other.param_groups[0]["lr"] == 0.5 * lr_scale(7, 10, 2, "cosine", 0.1)


@pytest.mark.parametrize("name", ALL)
def test_no_optimizer_reads_from_the_device(name: str) -> None:
    """A meta tensor has shapes and no values: what depends on a value raises."""
    net = small_net().to("meta")
    optimizer = build_optimizer(net, name, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.zeros(4, 3, 12, 12, device="meta")).sum().backward()
        optimizer.step()
    assert all(p in optimizer.state for p in net.parameters())


@pytest.mark.parametrize("name", ALL)
def test_a_state_in_another_memory_order_moves_the_weights_alike(name: str) -> None:
    """As it comes from a device that knows no channels_last; fused kernels read memory in order."""

    def stepped(reorder: bool) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
        net.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(net, name, lr=0.1)
        images = torch.randn(2, 4, 8, 8)
        for step in range(3):
            if step == 2 and reorder:
                state = optimizer.state_dict()
                for kept in state["state"].values():
                    kept |= {k: v.contiguous() for k, v in kept.items() if torch.is_tensor(v)}
                optimizer = build_optimizer(net, name, lr=0.1)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
        return net[1].weight.detach()

    assert torch.equal(stepped(reorder=True), stepped(reorder=False))
