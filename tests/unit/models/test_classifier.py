"""The classifier: its loss adds up over ranks and parts, its steps are quiet, its files plain."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.profiler import ProfilerActivity, profile

from lightship.data.batch import NOT_COUNTED, Batch
from lightship.models.classifier import ImageClassifier
from lightship.models.metrics import LOGGED
from lightship.models.nets.weights import read_weights
from lightship.storage import cache_path

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
WEIGHTED = {"class_weights": [0.5, 2.0, 1.0, 0.0, 1.5, 3.0, 0.25]}
FOCAL = {**WEIGHTED, "loss": "focal", "focal_gamma": 1.5, "label_smoothing": 0.1}


def classifier(**changes) -> ImageClassifier:
    torch.manual_seed(0)
    options = {
        "net": "litcnn",
        "class_names": CLASSES,
        "image_size_px": 16,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
        "optim": {"name": "sgd", "lr": 0.01, "schedule": "linear", "warmup_fraction": 0.5},
    }
    return ImageClassifier(**{**options, **changes})


def batch_of(seed: int, size: int = 8, skipped: tuple[int, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(len(CLASSES), (size,), generator=generator)
    labels[list(skipped)] = NOT_COUNTED
    return Batch(images, labels, torch.arange(size))


class Loader:
    """A loader of ready batches (Lightning takes a bare list for several loaders)."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def trainer(tmp_path, **changes) -> Trainer:
    options = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**options, **changes})


def test_images_are_normalised_as_torchvision_does() -> None:
    from torchvision.transforms.v2.functional import normalize, to_dtype

    module = classifier()
    seen = []
    module.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = batch_of(1)
    logits = module(batch.images)
    expected = normalize(
        to_dtype(batch.images, torch.float32, scale=True), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    )
    torch.testing.assert_close(seen[0], expected)
    assert torch.equal(module(batch.images.float()), logits)
    assert logits.shape == (8, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_normalises_in_full(dtype: torch.dtype) -> None:
    module = classifier()
    seen = []
    module.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = batch_of(1)
    module(batch.images)
    assert module.to(dtype)(batch.images).dtype == dtype
    assert torch.equal(seen[1], seen[0].to(dtype))


def test_channels_last_reaches_images_and_filters() -> None:
    module, plain = classifier(channels_last=True), classifier()
    seen = []
    module.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = batch_of(2)
    torch.testing.assert_close(module(batch.images), plain(batch.images))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert module.net[2].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_torchs_when_all_rows_count(smoothing: float) -> None:
    module, batch = classifier(label_smoothing=smoothing), batch_of(3)
    expected = F.cross_entropy(module(batch.images), batch.labels, label_smoothing=smoothing)
    torch.testing.assert_close(module.training_step(batch, 0), expected)


@pytest.mark.parametrize("options", [WEIGHTED, FOCAL])
def test_weights_and_focus_change_the_training_loss_alone(options: dict) -> None:
    module, plain, batch = classifier(**options).eval(), classifier().eval(), batch_of(3)
    rows = module.training_loss(module(batch.images), batch.labels, "none")
    torch.testing.assert_close(module.training_step(batch, 0), rows.sum() / 8)
    assert rows.sum() != plain.training_step(batch, 0) * 8
    for each in (module, plain):
        each.validation_step(batch, 0)
    results = [each.evaluation.compute() for each in (module, plain)]
    assert results[0]["loss"] == results[1]["loss"]


@pytest.mark.parametrize("options", [{}, WEIGHTED])
def test_mixed_loss_is_that_of_mixed_targets(options: dict) -> None:
    module = classifier(label_smoothing=0.1, **options)
    batch = batch_of(4, skipped=(2,))
    weight = torch.linspace(0.1, 1, 8)
    mixed = batch._replace(mixed_labels=batch.labels.roll(1).clamp(min=0), mix_weight=weight)
    target = weight[:, None] * F.one_hot(mixed.labels.clamp(min=0), 7)
    target += (1 - weight[:, None]) * F.one_hot(mixed.mixed_labels, 7)
    losses = F.cross_entropy(
        module(batch.images), target, module.training_loss.class_weights, label_smoothing=0.1,
        reduction="none",
    )  # fmt: skip
    counted = torch.arange(8) != 2
    torch.testing.assert_close(module.training_step(mixed, 0), losses[counted].sum() / 8)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, FOCAL])
@pytest.mark.parametrize("cut", [4, 2])
def test_ranks_and_parts_add_up_to_the_whole_batch(cut: int, options: dict) -> None:
    """As DDP and accumulation do: parts of equal size, gradients averaged; skips fall unevenly."""
    batch = batch_of(5, skipped=(0, 1, 2))
    whole = classifier(**options)
    whole.training_step(batch, 0).backward()
    parts = classifier(**options)
    for start in range(0, 8, cut):
        part = Batch(*(field[start : start + cut] for field in batch[:3]))
        (parts.training_step(part, 0) / (8 // cut)).backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert one.grad.abs().sum() > 0
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    sums, other_sums = whole.take_train_sums(), parts.take_train_sums()
    assert sums == pytest.approx(other_sums)


def test_train_sums_are_means_over_counted_rows_and_start_anew() -> None:
    module = classifier()
    batches = [batch_of(6), batch_of(7, skipped=(1, 5))]
    for batch in batches:
        module.training_step(batch, 0)
    logits = module(torch.cat([b.images for b in batches]))
    labels = torch.cat([b.labels for b in batches])
    counted = labels >= 0
    expected_loss = F.cross_entropy(logits[counted], labels[counted]).item()
    expected_acc = (logits.argmax(1) == labels)[counted].float().mean().item()
    sums = module.take_train_sums()
    assert sums == pytest.approx({"train/loss": expected_loss, "train/acc": expected_acc})
    assert module.take_train_sums() == {}
    module.training_step(batch_of(8, skipped=tuple(range(8))), 0)
    assert all(math.isnan(value) for value in module.take_train_sums().values())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("options", [{}, FOCAL])
def test_a_step_runs_where_nothing_can_be_read(mixed: bool, options: dict) -> None:
    """A meta tensor has shapes and no values: what waits for a value raises."""
    module = classifier(**options).to("meta")
    batch = Batch(*(field.to("meta") for field in batch_of(9)[:3]))
    if mixed:
        weight = torch.ones(8, device="meta")
        batch = batch._replace(mixed_labels=batch.labels, mix_weight=weight)
    module.training_step(batch, 0).backward()
    module.validation_step(batch, 0)
    with pytest.raises((NotImplementedError, RuntimeError)):
        module.take_train_sums()  # the one place that does wait


class ProfiledSteps(Callback):
    """Profiles all that happens from the end of batch `first` to the end of batch `last`."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.first:
            self.profiler.start()
        if batch_idx == self.last:
            self.profiler.stop()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_steps_between_log_points_are_quiet(tmp_path, clip) -> None:
    # SGD: the CPU kernel of fused Adam reads its own step count, which lies on the CPU.
    module, steps = classifier(), ProfiledSteps(2, 10)
    runner = trainer(tmp_path, callbacks=[steps], gradient_clip_val=clip)
    runner.fit(module, Loader(*map(batch_of, range(12))))
    counts = {event.key: event.count for event in steps.profiler.key_averages()}
    assert counts["aten::_fused_sgd_"] == 8  # the profiler did see the eight steps
    for waiting in ("aten::_local_scalar_dense", "aten::nonzero"):
        assert counts.get(waiting, 0) == 0
    assert module.take_train_sums()["train/loss"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_every_precision_learns_and_sums(tmp_path, precision: str) -> None:
    module = classifier(optim={"name": "muon", "lr": 1e-3})
    one = batch_of(14, skipped=(3,))
    mixed = one._replace(
        images=one.images.float(), mixed_labels=one.labels.roll(1), mix_weight=torch.ones(8)
    )
    runner = trainer(tmp_path, precision=precision, max_epochs=30)
    with torch.no_grad():
        before = module.training_step(one, 0).item()
    module.take_train_sums()
    runner.fit(module, Loader(mixed, one), Loader(one))
    assert module.take_train_sums()["train/loss"] < before
    assert runner.callback_metrics["val/loss"] < before


def test_fit_follows_the_schedule_to_its_end(tmp_path) -> None:
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    runner = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[Rates()])
    runner.fit(classifier(), Loader(*map(batch_of, range(4))))
    assert runner.global_step == 4
    expected = [0.01 * share for share in (1 / 3, 2 / 3, 1.0, 0.0)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(2)])


@pytest.mark.parametrize(("clip", "fused"), [(None, True), (1.0, False)])
def test_fp16_with_clipping_gets_an_optimizer_that_can_be_clipped(tmp_path, clip, fused) -> None:
    """Lightning refuses to clip what unscales by itself; a CPU has float16 and a scaler too."""
    module = classifier(optim={"name": "adam"})
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    runner = trainer(tmp_path, plugins=[plugin], gradient_clip_val=clip)
    runner.fit(module, Loader(*map(batch_of, range(3))))
    assert bool(runner.optimizers[0].param_groups[0]["fused"]) == fused


def test_bf16_is_clipped_with_a_fused_optimizer(tmp_path) -> None:
    """SGD's steps without momentum are as long as the gradients."""
    moved = []
    for clip in (None, 0.01):
        module = classifier(optim={"name": "sgd", "lr": 1.0, "momentum": 0.0})
        before = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        runner = trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=clip, max_epochs=1)
        runner.fit(module, Loader(batch_of(3)))
        assert runner.optimizers[0].param_groups[0]["fused"]
        after = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
        moved.append(float((after - before).norm()))
    assert moved[0] > 0.011
    assert moved[1] == pytest.approx(0.01, rel=1e-3)


def test_validation_and_test_are_exact_and_kept_for_the_report(tmp_path) -> None:
    module = classifier().eval()
    batches = [batch_of(11), batch_of(12, skipped=(4, 5, 6, 7))]
    runner = trainer(tmp_path)
    (validated,) = runner.validate(module, Loader(*batches), verbose=False)
    of_validation = module.eval_metrics
    (tested,) = runner.test(module, Loader(*batches), verbose=False)
    assert module.eval_metrics.keys() == of_validation.keys()
    assert torch.equal(module.eval_metrics["confusion"], of_validation["confusion"])
    with torch.no_grad():
        logits = module(torch.cat([b.images for b in batches]))
    labels = torch.cat([b.labels for b in batches])
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    assert validated.keys() == {f"val/{name}" for name in LOGGED}
    assert tested["test/num_samples"] == 12
    assert tested["test/acc"] == validated["val/acc"]
    assert tested["test/acc"] == (logits.argmax(1) == labels).double().mean().item()
    assert tested["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    of_class = [(logits[labels == k].argmax(1) == k).double().mean() for k in labels.unique()]
    assert tested["test/balanced_acc"] == pytest.approx(torch.stack(of_class).mean().item())
    assert runner.callback_metrics["test/acc"].dtype == torch.float64
    assert module.eval_metrics["confusion"].sum() == 12
    assert module.eval_metrics["confusion"].diagonal().sum() / 12 == tested["test/acc"]
    (again,) = runner.test(module, Loader(*batches), verbose=False)
    assert again == tested  # nothing is left over from the first


def test_flipped_views_average_probabilities(tmp_path) -> None:
    module = classifier(test_flip=True).eval()
    batch = batch_of(13, skipped=(7,))
    with torch.no_grad():
        views = [module(images).softmax(1) for images in (batch.images, batch.images.flip(3))]
    expected = (views[0] + views[1]) / 2
    ((ids, probabilities),) = trainer(tmp_path).predict(module, Loader(batch))
    torch.testing.assert_close(probabilities, expected)
    assert torch.equal(ids, batch.ids)
    (tested,) = trainer(tmp_path).test(module, Loader(batch), verbose=False)
    loss = F.nll_loss(expected[:7].log(), batch.labels[:7]).item()
    assert tested["test/loss"] == pytest.approx(loss, abs=1e-6)


def test_shifted_views_weigh_as_much_as_the_image(tmp_path) -> None:
    module = classifier(test_flip=True, test_shift=True).eval()
    batch = batch_of(14)
    padded = F.pad(batch.images.float(), (1,) * 4, mode="reflect").to(torch.uint8)
    size = batch.images.shape[3]
    corners = [padded[:, :, at : at + size, at : at + size] for at in (0, 2)]
    weights = {0: 0.25, 1: 0.125, 2: 0.125}
    with torch.no_grad():
        expected = sum(
            weights[kind] * module(view).softmax(1)
            for kind, images in enumerate([batch.images, *corners])
            for view in (images, images.flip(3))
        )
    ((_, probabilities),) = trainer(tmp_path).predict(module, Loader(batch))
    torch.testing.assert_close(probabilities, expected)


def test_a_checkpoint_alone_rebuilds_the_classifier(tmp_path) -> None:
    weights_path = tmp_path / "start.pt"
    torch.save(classifier().net.state_dict(), weights_path)
    module = classifier(channels_last=True, label_smoothing=0.1)
    module.load_weights(read_weights("litcnn", str(weights_path)))
    runner = trainer(tmp_path)
    runner.fit(module, Loader(*map(batch_of, range(3))))
    path = tmp_path / "last.ckpt"
    runner.save_checkpoint(path)
    weights_path.unlink()  # a rebuilt module must not ask for it
    loaded = ImageClassifier.load_from_checkpoint(path, weights_only=True)
    assert loaded.class_names == CLASSES
    assert loaded.optim.items() >= module.optim.items()
    images = batch_of(20).images
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    plain = torch.load(path, weights_only=True)
    assert plain["class_names"] == CLASSES
    assert all(key.startswith("net.") for key in plain["state_dict"])


def test_outside_the_steps_a_net_is_eager_and_left_as_it_was() -> None:
    model = classifier()
    calls: list[int] = []

    def backend(graph, inputs):
        def run(*arguments):
            calls.append(len(arguments))
            return graph(*arguments)

        return run

    model.net.compile(backend=backend)
    model.train()
    model.net[0].eval()  # a frozen part
    modes = [part.training for part in model.modules()]
    sizes: list[int] = []
    model.net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    state = torch.random.get_rng_state()
    images = batch_of(0, 150).images
    found = model.probabilities(images)
    assert not calls
    assert sum(sizes) == 150
    assert max(sizes) <= 64
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        expected = model.eval()(images).softmax(1)
    assert calls
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("net", ["normalised_first", "codes_first"])
def test_a_net_may_begin_without_weights(net: str) -> None:
    model = classifier(net=f"tests.support.own_nets:{net}").to(torch.bfloat16)
    assert model(batch_of(0).images).dtype == torch.bfloat16


def test_a_compiled_net_keeps_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is restored
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    module = classifier()
    names = list(module.state_dict())
    module.compile_net("default")
    assert list(module.state_dict()) == names
    assert module.net._compiled_call_impl is not None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_path("inductor")), "not in /tmp"


def run_rank(rank: int, address: str, path) -> None:
    """One of two processes of a real DDP test and fit, on its half of the batches."""
    import os

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=address, RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE="2", GROUP_RANK="0", LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    torch.set_num_threads(1)
    module = classifier(**FOCAL)
    runner = trainer(path, devices=2, strategy="ddp", use_distributed_sampler=False)
    own = [batch_of(30 + rank), batch_of(40, size=8, skipped=tuple(range(rank * 4, 8)))]
    (results,) = runner.test(module, Loader(*own), verbose=False)
    confusion = module.eval_metrics["confusion"]
    half = slice(rank * 4, rank * 4 + 4)
    halves = [Batch(*(field[half] for field in batch[:3])) for batch in TRAINED_ON]
    trainer(path, devices=2, strategy="ddp", use_distributed_sampler=False).fit(
        module, Loader(*halves)
    )
    sums = module.take_train_sums()
    torch.save([results, confusion, sums, module.state_dict()], path / f"{rank}.pt")


TRAINED_ON = [batch_of(60 + step, skipped=(0, 1, 2)) for step in range(4)]


def test_two_ranks_evaluate_and_train_as_one(tmp_path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torch.multiprocessing.start_processes(
        run_rank, args=(port, tmp_path), nprocs=2, start_method="spawn"
    )
    (results, confusion, sums, weights), other = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    assert [results, sums] == [other[0], other[2]]
    assert torch.equal(confusion, other[1])
    assert all(torch.equal(weights[key], other[3][key]) for key in weights)
    alone = classifier(**FOCAL)
    everything = [batch_of(30), batch_of(31), batch_of(40, skipped=tuple(range(8)))]
    everything.append(batch_of(40, skipped=tuple(range(4, 8))))
    (expected,) = trainer(tmp_path).test(alone, Loader(*everything), verbose=False)
    assert expected == pytest.approx(results, rel=1e-12)
    assert torch.equal(confusion, alone.eval_metrics["confusion"])
    assert results["test/num_samples"] == 20

    trainer(tmp_path).fit(alone, Loader(*TRAINED_ON))
    assert sums == pytest.approx(alone.take_train_sums(), rel=1e-5)
    start = classifier().state_dict()
    for key, value in alone.state_dict().items():
        moved, apart = (value - start[key]).norm(), (value - weights[key]).norm()
        assert moved > 0, key
        assert apart < 1e-3 * moved, key
