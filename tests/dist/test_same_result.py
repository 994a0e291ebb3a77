"""The same learning on any number of processes: batches, gradients, evaluation, predictions."""

import csv
import json
from collections.abc import Callable

import pytest
import torch

from tests.dist.conftest import Job
from tests.support.images import little_set, put


def done(job: Job, *flags: str, **options: str) -> Job:
    agent = job.start(*flags, **options)
    assert agent.wait() == 0, agent.said
    return job


@pytest.mark.parametrize("processes", [2, 4])
def test_a_step_is_that_of_one_process(job: Callable[..., Job], processes: int) -> None:
    """SGD with rate 1 moves the weights by the gradient of the global batch."""
    step = ["--optim.name=sgd", "--optim.momentum=0", "--optim.lr=1", "--trainer.max_steps=1"]
    alone = done(job(*step), "--trainer.devices=1").weights()
    shared = done(job(*step), f"--trainer.devices={processes}").weights()
    assert alone.keys() == shared.keys()
    untrained = done(job(*step, "--optim.lr=0"), "--trainer.devices=1").weights()
    for name in alone:
        assert not torch.equal(alone[name], untrained[name]), name
        assert torch.allclose(alone[name], shared[name], rtol=0, atol=1e-6), name


def test_parts_of_a_batch_on_several_processes(job: Callable[..., Job]) -> None:
    step = ["--optim.name=sgd", "--optim.momentum=0", "--optim.lr=1", "--trainer.max_steps=1"]
    step += ["--model.loss=focal", "--model.class_weights=balanced"]
    alone = done(job(*step), "--trainer.devices=1").weights()
    parts = done(job(*step), "--trainer.devices=2", "--trainer.accumulate_grad_batches=3").weights()
    for name in alone:
        assert torch.allclose(alone[name], parts[name], rtol=0, atol=1e-6), name


def test_layers_that_begin_to_train_later_are_averaged_over_the_processes(
    job: Callable[..., Job],
) -> None:
    """DDP must reduce the gradients of other parameters from the second epoch on."""
    flags = ["--optim.name=sgd", "--optim.momentum=0", "--optim.lr=0.05", "--trainer.max_epochs=2"]
    staged = [*flags, "--model.freeze=backbone", "--model.unfreeze_epoch=1"]
    alone = done(job(*staged), "--trainer.devices=1").weights()
    shared = done(job(*staged), "--trainer.devices=2").weights()
    untrained = done(job(*flags, "--optim.lr=0"), "--trainer.devices=1").weights()
    frozen = done(job(*flags, "--model.freeze=backbone"), "--trainer.devices=2").weights()
    head = sorted(alone)[-2:]
    for name in alone:
        assert not torch.equal(alone[name], untrained[name]), name
        assert torch.allclose(alone[name], shared[name], rtol=0, atol=1e-5), name
        assert torch.equal(frozen[name], untrained[name]) == (name not in head), name


def test_a_head_from_features_is_that_of_one_process(job: Callable[..., Job]) -> None:
    """And so are the first gradients, by which SGD with rate 1 moves the weights."""
    step = ["--optim.name=sgd", "--optim.momentum=0", "--trainer.max_steps=1"]
    step += ["--model.head_init=features"]
    still = [done(job(*step, "--optim.lr=0"), f"--trainer.devices={n}").weights() for n in (1, 2)]
    moved = [done(job(*step, "--optim.lr=1"), f"--trainer.devices={n}").weights() for n in (1, 2)]
    plain = done(job(*step[:-1], "--optim.lr=0"), "--trainer.devices=1").weights()
    head = sorted(plain)[-2:]
    for name in plain:
        assert torch.equal(still[0][name], still[1][name]), name
        assert torch.equal(still[0][name], plain[name]) == (name not in head), name
        assert torch.allclose(moved[0][name], moved[1][name], rtol=0, atol=1e-6), name
        assert not torch.equal(moved[0][name], still[0][name]), name


def test_precise_batch_norm_statistics_are_those_of_one_process(job: Callable[..., Job]) -> None:
    """Also of layers whose input depends on the statistics of the layers before them."""
    flags = ["--model.net=tests.support.own_nets:twenty_blocks", "--model.batch_norm=precise"]
    flags += ["--optim.lr=0", "--trainer.max_epochs=1"]
    alone = done(job(*flags), "--trainer.devices=1").checkpoint()["state_dict"]
    shared = done(job(*flags), "--trainer.devices=2").checkpoint()["state_dict"]
    means = [name for name in alone if name.endswith("running_mean")]
    assert len(means) == 20
    for name in (*means, *(name.replace("mean", "var") for name in means)):
        assert torch.allclose(alone[name], shared[name], rtol=0, atol=1e-6), name
        assert float(alone[name].abs().max()) > 1e-4, "far from what the bound would hide"


def test_a_whitening_layer_is_that_of_one_process(job: Callable[..., Job]) -> None:
    """Also where its bias has come to rest, and DDP waits for a gradient of it all the same."""
    flags = ["--model.net=speednet", "--data.image_size_px=12", "--optim.name=muon-sgd"]
    flags += ["--optim.lr=0.1", "--optim.whitening_fraction=0.1", "--trainer.max_epochs=2"]
    alone = done(job(*flags), "--trainer.devices=1").weights()
    shared = done(job(*flags), "--trainer.devices=2").weights()
    whitening = "net.whiten.weight"
    assert torch.equal(alone[whitening], shared[whitening])
    assert torch.equal(alone[whitening][:12], -alone[whitening][12:])
    bias = "net.whiten.bias"
    assert torch.allclose(alone[bias], shared[bias], rtol=0, atol=0.05)


def test_a_run_ends_like_that_of_one_process(job: Callable[..., Job], reference: Job) -> None:
    alone = done(job(), "--trainer.devices=1")
    assert alone.batches() == reference.batches()
    assert len(alone.batches()) == 20
    assert alone.numbers().keys() == reference.numbers().keys()
    for name, value in alone.numbers().items():
        assert value == pytest.approx(reference.numbers()[name], abs=1e-3), name
    assert reference.numbers()["test/num_samples"] == 5


def test_every_rank_takes_fast_steps(reference: Job) -> None:
    assert [reference.fast_steps(rank) for rank in range(2)] == [[*range(20)]] * 2


@pytest.mark.parametrize(("first", "then"), [("1", "2"), ("2", "1")])
def test_a_run_goes_on_at_another_size(
    job: Callable[..., Job], reference: Job, first: str, then: str
) -> None:
    run = job()
    done(run, f"--trainer.devices={first}", "--trainer.max_steps=8")
    (run.output / "DONE").unlink()
    done(run, f"--trainer.devices={then}")
    assert run.batches() == reference.batches()
    for name, value in run.numbers().items():
        assert value == pytest.approx(reference.numbers()[name], abs=1e-3), name


@pytest.mark.parametrize("processes", ["1", "2", "4"])
def test_streamed_images_are_those_of_memory(
    job: Callable[..., Job], reference: Job, processes: str
) -> None:
    run = done(job("--data.mode=streaming"), f"--trainer.devices={processes}")
    assert run.batches() == reference.batches()
    if processes != "2":
        return
    expected = reference.weights()
    for name, value in run.weights().items():
        assert torch.equal(value, expected[name]), name
    assert run.numbers() == reference.numbers()


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 images to train on, 3 of which are none."""
    files = {**little_set(("train",), per_class=20), **little_set(("test",), per_class=2)}
    bad = ("train/ant/003.png", "train/bee/011.png", "train/cat/000.png")
    files |= dict.fromkeys(bad, b"none")
    return put(str(tmp_path_factory.mktemp("spoilt")), files)


def skipping(job: Callable[..., Job], root: str, bound: float) -> Job:
    return job(
        f"--data.root={root}", "--data.val_fraction=0", "--data.mode=streaming",
        "--data.on_error=skip", f"--data.max_bad_fraction={bound}",
    )  # fmt: skip


def test_bad_images_of_all_processes_count_once(job: Callable[..., Job], spoilt: str) -> None:
    """Against the whole split, also over the epochs and a restart: 3 of 60 are 0.05."""
    run = skipping(job, spoilt, 0.05)
    done(run, "--trainer.devices=4", "--trainer.max_steps=8")
    assert run.checkpoint()["ImageData"]["train"]["told"].keys() == {3, 31, 40}
    (run.output / "DONE").unlink()
    done(run, "--trainer.devices=4")
    assert run.checkpoint()["ImageData"]["train"]["told"].keys() == {3, 31, 40}
    page = (run.output / "report" / "report.html").read_text()
    assert "3 samples skipped" in page


def test_too_many_bad_images_end_several_processes_too(
    job: Callable[..., Job], spoilt: str
) -> None:
    """Though none of them meets too many itself: they compare before an epoch's end is saved."""
    run = skipping(job, spoilt, 0.04)
    agent = run.start("--trainer.devices=4")
    assert agent.wait() == 65, agent.said
    assert "at least 3 of 60 images are bad" in agent.said
    assert "--data.max_bad_fraction 0.04" in agent.said
    assert run.committed() < 5


def test_two_nodes_of_two(job: Callable[..., Job], reference: Job) -> None:
    run = job()
    agents = [run.start_node(PET_NPROC_PER_NODE="2") for _ in range(2)]
    assert [agent.wait() for agent in agents] == [0, 0], agents[0].said
    assert run.batches() == reference.batches()
    for name, value in run.numbers().items():
        assert value == pytest.approx(reference.numbers()[name], abs=1e-3), name


def test_rank_0_alone_writes(reference: Job) -> None:
    """One start of the run, one report, one set of checkpoints; nothing of rank 1's on the way."""
    output = reference.output
    attempts = {
        json.loads(path.read_text())["attempt"] for path in output.glob("checkpoints/*.json")
    }
    assert attempts == {(output / "checkpoints" / "attempt").read_text().split()[0]}
    said = reference.agents[0].said
    assert said.count("training tests.dist.nets:plain") == 1
    assert said.count("done: test/") == 1
    assert "rank 1" not in said
    assert "Traceback" not in said


def test_evaluation_counts_every_image_once(job: Callable[..., Job], reference: Job) -> None:
    """5 images on 2 processes: the padded sixth does not count."""
    measured = job("--trainer.devices=2")
    measured.output = reference.output
    done(measured, command="test")
    numbers = json.loads((reference.output / "report" / "test.json").read_text())
    assert numbers["test/num_samples"] == 5
    assert numbers["test/acc"] == reference.numbers()["test/acc"]


def test_predictions_of_all_processes_make_one_table(
    job: Callable[..., Job], reference: Job, images: str
) -> None:
    tables = []
    for processes in (1, 2):
        predicted = job()
        predicted.output = reference.output
        table = predicted.folder / "table.csv"
        done(
            predicted,
            f"--data.root={images}/test",
            f"--trainer.devices={processes}",
            f"--predictions={table}",
            command="predict",
        )
        tables.append(list(csv.DictReader(table.open())))
    assert len(tables[0]) == 5
    assert [row["path"] for row in tables[0]] == [row["path"] for row in tables[1]]
    assert [row["class"] for row in tables[0]] == [row["class"] for row in tables[1]]


def test_running_statistics_are_rank_0s(job: Callable[..., Job]) -> None:
    """What a fit validates is what its checkpoint holds, though ranks' statistics differ."""
    run = done(job("--model.net=tests.dist.nets:normed"), "--trainer.devices=2")
    fitted = run.numbers()
    done(run, "--trainer.devices=1", command="validate")
    again = json.loads((run.output / "report" / "val.json").read_text())
    assert again["val/loss"] == pytest.approx(fitted["val/loss"], abs=1e-6)
    assert again["val/acc"] == fitted["val/acc"]
