"""Each check of the doctor fails on its fault, and names the fix of that fault."""

import base64
import contextlib
import http.server
import io
import json
import re
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from torch import nn

from lightship import cli, storage
from lightship.commands.base import Command
from lightship.commands.doctor import import_fit
from lightship.config import DataConfig
from lightship.doctor import (
    allreduce,
    container,
    data,
    dry_run,
    gpus,
    packages,
    render,
    rendezvous,
    samples,
)
from lightship.doctor.checks import CHECKS, Check, Finding, skipped
from lightship.doctor.context import Context
from lightship.doctor.dry_run import StepCost
from lightship.doctor.memory import Room, estimate
from lightship.doctor.runner import run
from lightship.doctor.samples import FirstSamples
from lightship.errors import LightshipError
from lightship.host import Limits, read_limits
from lightship.models.nets.build import build_net
from tests.support.faults import FaultProxy
from tests.support.images import (
    cifar10,
    cifar_pixels,
    little_set,
    parquet,
    put,
    tarred,
    webdataset,
    zipped,
)
from tests.support.s3 import KEYS, S3Server, free_ports

GIB = 2**30
NET = "--model.net=tests.support.own_nets:pooled_linear"


def context(*flags: str, load: Callable[[], None] = lambda: None) -> Context:
    command = cli.parse(["doctor", *flags])
    assert isinstance(command, Command)
    return Context(command.config, command.wrong, False, load)


@dataclass
class Lab:
    """Where faults are made.

    Attributes:
        path: An empty folder.
        s3: A real server.
        env: Sets variables until the test's end.
    """

    path: Path
    s3: S3Server
    env: pytest.MonkeyPatch

    def finding(self, name: str, *flags: str) -> Finding:
        """What the check of that name finds for `lightship doctor FLAGS`."""
        checks = [check for check in CHECKS if check.name == name]
        [(_, finding)] = run(checks, context(f"--run.output={self.path}/run", *flags))
        return finding

    def answer(self, look: Callable[[], Finding]) -> Finding:
        """What any function finds as a check, its errors included."""
        [(_, finding)] = run([Check("x", lambda _: look(), "harm", "fix it")], context())
        return finding


@pytest.fixture
def lab(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "8")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    wandb.teardown()  # it reads its variables once in a process
    for name in ("PET_NNODES", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return Lab(tmp_path, s3, monkeypatch)


def package(folder: Path, name: str, version: str, needs: str = "") -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    more = f"Requires-Dist: {needs}\n" if needs else ""
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}"
    )


def installed(lab: Lab, torch: str, needs: str) -> Finding:
    for name, version in (("torch", torch), ("lightning", "2.6.0")):
        package(lab.path, name, version)
    package(lab.path, "torchvision", "0.24.0", needs)
    return packages_in(lab)


def packages_in(lab: Lab) -> Finding:
    at = context()
    with lab.env.context() as env:
        env.setattr("sys.path", [str(lab.path)])
        return packages.packages(at)


def gpu_device(lab: Lab) -> str:
    (lab.path / "nvidia0").touch()
    return str(lab.path)


def v2(lab: Lab, own: str = "/", **files: str) -> Limits:
    """A tree of cgroups of version 2; keys are like `pod__memory_max`."""
    (lab.path / "cgroup.controllers").write_text("cpu memory")
    return _cgroups(lab, f"0::{own}\n", files)


def v1(lab: Lab, own: str = "/", **files: str) -> Limits:
    """Of version 1."""
    return _cgroups(lab, f"4:memory:{own}\n2:cpu,cpuacct:{own}\n", files)


def _cgroups(lab: Lab, own: str, files: dict[str, str]) -> Limits:
    for name, text in files.items():
        path = lab.path / name.replace("__", "/").replace("DOT", ".").replace("COMMA", ",")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (lab.path / "own").write_text(own)
    return read_limits(str(lab.path), str(lab.path / "own"))


def limited(look: Callable[[Context, Limits], Finding], limits: Limits, *flags: str) -> Finding:
    """What a check finds within these limits, on CPUs."""
    return look(context("--trainer.accelerator=cpu", *flags), limits)


def two_gpus(path: str) -> Finding:
    at = context()
    at.on_gpus, at.processes = True, 2
    return container.shared(at, path)


@contextlib.contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


def port_taken(lab: Lab) -> Finding:
    with listening() as port:
        lab.env.setenv("PET_NNODES", "2")
        lab.env.setenv("PET_RDZV_ENDPOINT", f"127.0.0.1:{port}")
        return lab.finding("rendezvous")


def endpoint(host: str, is_host: bool | None, port: int | None = None) -> rendezvous.Endpoint:
    port = port or free_ports(1)[0]
    return rendezvous.Endpoint(host, port, 2, is_host, "PET_RDZV_ENDPOINT")


def silent_interface(lab: Lab) -> Finding:
    lab.env.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    return lab.finding("all-reduce", "--trainer.devices=2", "--trainer.accelerator=cpu")


def denied_output(lab: Lab) -> Finding:
    key, secret = KEYS["reader"]
    lab.env.setenv("AWS_ACCESS_KEY_ID", key)
    lab.env.setenv("AWS_SECRET_ACCESS_KEY", secret)
    return lab.finding("output", f"--run.output={lab.s3.url('run')}")


def below_a_file(lab: Lab) -> Finding:
    (lab.path / "file").touch()
    return lab.finding("output", f"--run.output={lab.path}/file/run")


def behind_proxy(lab: Lab, fault: str, name: str, *flags: str) -> Finding:
    with FaultProxy(lab.s3.endpoint) as proxy:
        proxy.plan(fault, methods=("GET", "HEAD", "PUT"))
        lab.env.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        return lab.finding(name, *flags)


def slow_store(lab: Lab) -> Finding:
    root = put(lab.s3.url("images"), little_set(("train",)))
    flags = ("--data.mode=streaming", "--model.net=tests.support.own_nets:pooled_linear")
    return behind_proxy(lab, "slow", "data", f"--data.root={root}", *flags)


def images_of(lab: Lab, more: dict[str, bytes]) -> str:
    """A hundred sound images and some more files."""
    files = little_set(("train",), per_class=34)
    return f"--data.root={put(str(lab.path / 'images'), {**files, **more})}"


def empty_class(lab: Lab) -> Finding:
    root = images_of(lab, {})
    (lab.path / "images" / "train" / "dog").mkdir()
    return lab.finding("data set", root, NET)


def images(lab: Lab, damage: bool = False) -> str:
    files = little_set(("train",))
    if damage:
        files["train/ant/000.png"] = files["train/ant/000.png"][:40]
    return f"--data.root={put(str(lab.path / 'images'), files)}"


def unreadable_kinds(lab: Lab) -> Finding:
    files = {**little_set(("train",)), "train/ant/x.heic": b"x", "train/ant/y.heic": b"y"}
    with tarfile.open(lab.path / "images.tar", "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.examine(DataConfig(root=f"{lab.path}/images.tar"), 9)


class Wandb(http.server.BaseHTTPRequestHandler):
    """Answers as W&B's server does to a key it knows (all of `a`), or does not."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        login = base64.b64decode(self.headers["Authorization"].removeprefix("Basic "))
        knows = login == b"api:" + b"a" * 40
        self.send_response(200 if knows else 401)
        self.end_headers()
        self.wfile.write(b'{"data": {"viewer": {"username": "ada"}}}' if knows else b"{}")

    def log_message(self, *args: object) -> None:
        pass


def wandb_key(lab: Lab, key: str) -> Finding:
    with http.server.HTTPServer(("127.0.0.1", 0), Wandb) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        lab.env.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        lab.env.setenv("WANDB_API_KEY", key)
        try:
            return lab.finding("W&B key")
        finally:
            server.shutdown()


def broken_wandb(lab: Lab) -> Finding:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    lab.env.setattr("wandb.init", fail)
    return lab.finding("W&B key")


def nobodys_wandb(lab: Lab) -> Finding:
    lab.env.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    lab.env.setenv("WANDB_API_KEY", "a" * 40)
    return lab.finding("W&B key")


def memory(lab: Lab, cost: StepCost, gib: float, *flags: str, on_gpu: bool = False) -> Finding:
    limit = int(gib * GIB)
    room = Room(1, 1, None if on_gpu else limit, limit if on_gpu else None)
    return estimate(context(*flags).config, cost, room, 0)


def another_run(lab: Lab) -> Finding:
    flags = ["fit", f"--run.output={lab.path}/run", "--run.tracking=none", "--data.val_fraction=0"]
    flags += ["--trainer.max_steps=1", "--model.net=tests.support.own_nets:pooled_linear"]
    assert cli.main([*flags, "--run.log_images=0", "--trainer.limit_test_batches=1"]) == 0
    return lab.finding("run at output", "--optim.lr=0.5")


WIDE = StepCost(10**6, 16 * 10**6, 100 * 2**20, 2**20, 100.0)
WIDE_IN_EVALUATION = StepCost(10**6, 16 * 10**6, 2**20, 100 * 2**20, 100.0)


# Name -> (the fault, status, what is found, the fix).
def other_weights(lab: Lab) -> str:
    torch.save({"first.weight": torch.ones(2)}, lab.path / "w.pth")
    return f"--model.weights={lab.path}/w.pth"


FAULTS: dict[str, tuple[Callable[[Lab], Finding], str, str, str]] = {
    "torchvision for another torch": (
        lambda lab: installed(lab, "2.8.0", "torch==2.9.0"), "fail", "torch 2.8.0",
        r"pip install 'torch==2.9.\*' 'torchvision==0.24.0'"),
    "torchvision for a newer torch": (
        lambda lab: installed(lab, "2.8.0+cu126", "torch (>=2.9.0)"), "fail", "torch 2.8.0",
        r"pip install 'torch==2.9.\*'"),
    "no torch": (
        packages_in, "fail", "no package torch", r"pip install \. in its checkout"),
    "driver too old": (
        lambda lab: gpus.compare_cuda("auto", "13.0", (12, 4), str(lab.path)), "fail",
        "CUDA 13.0; the driver runs up to 12.4", "update the driver to one of CUDA 13"),
    "GPU without driver": (
        lambda lab: gpus.compare_cuda("auto", "12.6", None, gpu_device(lab)), "fail",
        "no NVIDIA driver answers", "--gpus all"),
    "torch without CUDA": (
        lambda lab: gpus.compare_cuda("auto", None, None, gpu_device(lab)), "warn",
        "built without CUDA; 1 GPUs", "download.pytorch.org/whl/cu"),
    "torch without CUDA, GPU asked for": (
        lambda lab: gpus.compare_cuda("gpu", None, None, str(lab.path)), "fail",
        "built without CUDA", "download.pytorch.org/whl/cu"),
    "more processes than GPUs": (
        lambda lab: lab.finding("GPUs", "--trainer.accelerator=gpu", "--trainer.devices=999"),
        "fail", "999", "nvidia.com/gpu"),
    "two numbers of processes": (
        lambda lab: (lab.env.setenv("PET_NPROC_PER_NODE", "3"),  # type: ignore[func-returns-value]
                     lab.finding("GPUs", "--trainer.devices=2"))[1],
        "fail", "PET_NPROC_PER_NODE is 3", "unset PET_NPROC_PER_NODE"),
    "memory limit, cgroup v2": (
        lambda lab: limited(container.memory, v2(lab, memoryDOTmax="268435456")), "fail",
        r"limit 0.25 GiB \(cgroup v2\)", "resources.limits.memory, docker run --memory"),
    "memory limit of the cgroup above": (
        lambda lab: limited(
            container.memory,
            v2(lab, "/pod/box", pod__memoryDOTmax="268435456", pod__box__memoryDOTmax="max")),
        "fail", "limit 0.25 GiB", "resources.limits.memory"),
    "memory limit, cgroup v1": (
        lambda lab: limited(
            container.memory,
            v1(lab, "/box", memory__box__memoryDOTlimit_in_bytes="268435456",
               memory__memoryDOTlimit_in_bytes="9223372036854771712")),
        "fail", r"limit 0.25 GiB \(cgroup v1\)", "resources.limits.memory"),
    "CPU limit, cgroup v2": (
        lambda lab: limited(container.cpu, v2(lab, cpuDOTmax="50000 100000")), "warn",
        r"limit 0.5 \(cgroup v2\); 1 processes", r"CPU limit \(resources.limits.cpu"),
    "CPU limit, cgroup v1": (
        lambda lab: limited(
            container.cpu,
            v1(lab, cpuCOMMAcpuacct__cpuDOTcfs_quota_us="150000",
               cpuCOMMAcpuacct__cpuDOTcfs_period_us="100000"),
            "--trainer.devices=2"),
        "warn", r"limit 1.5 \(cgroup v1\)", "raise the CPU limit .* to 2"),
    "threads beyond the CPU limit": (
        lambda lab: limited(
            container.cpu, v2(lab, cpuDOTmax="200000 100000"), "--data.decode_threads=64"), "warn",
        "64 decoding threads per process", "leave --data.decode_threads out or set 2, or raise"),
    "too small /dev/shm": (
        lambda lab: lab.answer(lambda: two_gpus("/proc")), "fail",
        "/proc has 0 MiB free; 2 GPUs on one node need 256 MiB: docker run --shm-size=256m", ""),
    "port taken": (port_taken, "fail", "cannot bind port .* on node 0, this node",
                   r"stop the process that listens .* or set another port in PET_RDZV_ENDPOINT"),
    "port refuses": (
        lambda lab: rendezvous.meet(endpoint("127.0.0.1", False), 1.0), "fail",
        "127.0.0.1:.*refused", "start the doctor on all nodes at once"),
    "nobody came": (
        lambda lab: rendezvous.meet(endpoint("localhost", True), 0.5), "warn",
        "0 of 1 nodes connected", "start the doctor on all nodes at once"),
    "name without address": (
        lambda lab: rendezvous.meet(endpoint("node-0.nowhere.invalid", None), 1.0), "fail",
        "PET_RDZV_ENDPOINT: the name node-0.nowhere.invalid does not resolve",
        "correct PET_RDZV_ENDPOINT; in Kubernetes it is POD.SERVICE"),
    "no rendezvous": (
        lambda lab: (lab.env.setenv("PET_NNODES", "2"), lab.finding("rendezvous"))[1],  # type: ignore[func-returns-value]
        "fail", "PET_NNODES is 2", "PET_RDZV_ENDPOINT=HOST:PORT of node 0"),
    "no such interface": (silent_interface, "fail", "GLOO_SOCKET_IFNAME=nosuch0",
                          "correct GLOO_SOCKET_IFNAME"),
    "no data": (
        lambda lab: lab.finding("data", f"--data.root={lab.path}/nothing"), "fail",
        "nothing", "correct --data.root"),
    "no bucket": (
        lambda lab: lab.finding("data", "--data.root=s3://no-such-bucket/x"), "fail",
        "no-such-bucket", "correct --data.root"),
    "no images": (
        lambda lab: (put(str(lab.path / "text"), {"a/b.txt": b"x"}),
                     lab.finding("data", f"--data.root={lab.path}/text"))[1],
        "fail", r"1 .txt file; looked for class folders", "correct --data.root"),
    "a damaged image": (
        lambda lab: lab.finding("data", images(lab, damage=True), "--data.image_size_px=8"),
        "fail", "image|truncated|damaged", "fix the file that is named"),
    "images that are not square": (
        lambda lab: lab.finding(
            "data", f"--data.root={put(str(lab.path / 'wide'), little_set(size_px=(8, 12)))}", NET),
        "fail", "12x8 px, which is not square: set --data.image_size_px", "fix the file"),
    "an empty class folder": (
        empty_class, "fail", "class folder train/dog/ has no image", "fix the data that is named"),
    "no train split": (
        lambda lab: lab.finding(
            "data set", f"--data.root={put(str(lab.path), little_set(('test',)))}", NET),
        "fail", "12 test images.*no train split", "train/"),
    "an image that cannot be read among many": (
        lambda lab: lab.finding(
            "data set", images_of(lab, {"train/cat/page.jpg": b"<html>"}), NET),
        "fail", r"103 train images in 3 classes \(ant, bee, cat\); 1 of 103 examined cannot be "
        "read, such as (train/)?cat/page.jpg", "--data.on_error skip"),
    "an empty file to be left out": (
        lambda lab: lab.finding("data set", images_of(lab, {"train/cat/none.jpg": b""}), NET,
                                "--data.on_error=skip"),
        "warn", "1 of 103 examined cannot be read, such as .*none.jpg", "fix or remove"),
    "too many to be left out": (
        lambda lab: lab.finding("data set", images_of(lab, {"train/cat/none.jpg": b""}), NET,
                                "--data.on_error=skip", "--data.max_bad_fraction=0.001"),
        "fail", "1 of 103", r"raise --data.max_bad_fraction \(0.001\)"),
    "a slow store": (slow_store, "fail", r"images/s.*training needs",
                     "lightship pack .* --data.cache_gib"),
    "output denied": (denied_output, "fail", "access denied",
                      "permission to read, write and delete"),
    "output below a file": (below_a_file, "fail", "cannot be written", "on a writable volume"),
    "clock an hour ahead": (
        lambda lab: behind_proxy(
            lab, "hour ahead", "clock", f"--run.output={lab.s3.url('run')}"),
        "fail", r"the storage is 3\d{3} s ahead", "set this machine's clock"),
    "another run at the output": (another_run, "fail", "optim.lr was 0.005, now 0.5",
                                  "another --run.output"),
    "files of kinds that no reader takes": (
        unreadable_kinds, "warn", "not read: 2 .*heic", "convert them"),
    "no W&B key": (lambda lab: lab.finding("W&B key"), "warn", "WANDB_API_KEY is not set",
                   "set WANDB_API_KEY .* --run.tracking offline"),
    "a W&B key cut short": (lambda lab: wandb_key(lab, "a" * 39), "fail", "has 39 characters",
                            "set WANDB_API_KEY"),
    "a W&B key with a newline": (lambda lab: wandb_key(lab, "a" * 40 + " "), "fail",
                                 "whitespace", r"correct the WANDB_\* variable"),
    "a W&B key with quotes": (lambda lab: wandb_key(lab, "'" + "a" * 40 + "'"), "fail",
                              "characters other than", "set WANDB_API_KEY"),
    "a W&B key that is refused": (lambda lab: wandb_key(lab, "b" * 40), "fail",
                                  r"rejects the key \(401\)", "create a key"),
    "a project that W&B refuses": (
        lambda lab: lab.finding("W&B key", "--run.project=a/b"), "fail", "--run.project: .*'a/b'",
        "correct the WANDB"),
    "W&B cannot be started": (broken_wandb, "warn", "failed to start .*No space left",
                              "WANDB_DIR"),
    "no W&B server": (nobodys_wandb, "warn", "does not answer as W&B does",
                      "HTTPS_PROXY.*WANDB_BASE_URL.*--run.tracking offline"),
    "batch larger than the GPU": (
        lambda lab: memory(lab, WIDE, 4, "--data.global_batch_size=128", on_gpu=True), "fail",
        "of 4.0 GiB per GPU.*training batch of 128 18.75", "--trainer.accumulate_grad_batches 2"),
    "evaluation larger than memory": (
        lambda lab: memory(lab, WIDE_IN_EVALUATION, 4), "fail",
        "of 4.0 GiB per node.*evaluation batch of 512 50.00", "--data.eval_batch_size 128"),
    "a real net that fits nowhere": (
        lambda lab: lab.finding("model memory", "--model.net=tests.support.own_nets:bulky",
                                "--data.eval_batch_size=1048576", "--data.image_size_px=64"),
        "fail", "bulky|evaluation batch of 1048576", "--data.eval_batch_size 262144"),
    "no such net": (
        lambda lab: lab.finding("model memory", "--model.net=resnet81"), "fail", "did you mean",
        "change --model.net"),
    "value out of range": (
        lambda lab: lab.finding("configuration", "--data.global_batch_size=0"), "fail",
        "--data.global_batch_size is 0", "change the named flag"),
    "batch that does not divide": (
        lambda lab: lab.finding("configuration", "--data.global_batch_size=33",
                                "--trainer.devices=2", "--trainer.accelerator=cpu"),
        "fail", "33 is not divisible by 2", "change the named flag"),
    "odd batch to mix": (
        lambda lab: lab.finding("configuration", "--data.global_batch_size=33",
                                "--data.mixup_alpha=0.2"),
        "fail", "must be even", "change the named flag"),
    "padding as large as the smallest images": (
        lambda lab: lab.finding("configuration", "--data.sizes_px=4,32", "--data.image_size_px=32",
                                "--data.crop_padding_px=4"),
        "fail", "crop_padding_px is 4; .* less than the image's 4 px .*--data.sizes_px",
        "change the named flag"),
    "precision unknown to Lightning": (
        lambda lab: lab.finding("configuration", "--trainer.precision=17"), "fail",
        "--trainer.precision 17", "change the named flag"),
    "weights of another net": (
        lambda lab: lab.finding("fine-tuning", images(lab), NET, other_weights(lab)), "fail",
        "w.pth does not fit --model.net", "set --model.weights to a file of weights"),
    "disk too small": (
        lambda lab: lab.finding("cache disk", "--data.root=s3://b/x", "--data.cache_gib=1000000"),
        "fail", "--data.cache_gib 1e.06 needs 1000000.0 GiB",
        "LIGHTSHIP_CACHE to a folder on a larger disk, or lower --data.cache_gib"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_with_its_fix(fault: str, lab: Lab) -> None:
    inject, status, found, fix = FAULTS[fault]
    finding = inject(lab)
    assert finding.status == status, finding
    assert re.search(found, finding.found), finding
    assert re.search(fix, finding.fix), finding
    assert finding.means


def test_every_check_has_a_fault_of_its_own() -> None:
    """Those found by name above, and the functions that are called directly."""
    assert {check.name for check in CHECKS} == {
        "configuration", "packages", "imports", "GPU driver", "GPUs", "CPU", "memory limit",
        "/dev/shm", "rendezvous", "all-reduce", "data", "data set", "output", "run at output",
        "clock", "W&B key", "fine-tuning", "model memory", "cache disk",
    }  # fmt: skip


def test_weights_are_read_and_rates_shown(lab: Lab) -> None:
    assert lab.finding("fine-tuning", images(lab), NET).status == "skipped"
    torch.save(build_net("litcnn", 7, 32).state_dict(), lab.path / "w.pth")
    weights = f"--model.weights={lab.path}/w.pth"
    flags = (images(lab), "--model.net=litcnn", "--data.image_size_px=32", weights)
    finding = lab.finding("fine-tuning", *flags, "--optim.lr=0.5", "--optim.head_lr_scale=4")
    assert finding.status == "ok"
    assert re.match(r"parameters and peak learning rates: head [\d,]+ at 2; layers", finding.found)


def test_a_listing_that_takes_too_long_is_no_fault(monkeypatch) -> None:
    listed = threading.Event()
    monkeypatch.setattr(data, "scan", lambda *_: listed.wait(60) and {})
    found = data.examine(DataConfig(root="somewhere"), 3.5)
    listed.set()
    assert found.status == "skipped"
    assert "not listed within" in found.found


def test_an_unreadable_first_image_is_left_out_where_a_fit_does(lab: Lab) -> None:
    flags = (images(lab, damage=True), NET)
    assert lab.finding("data", *flags).status == "fail"
    assert lab.finding("data", *flags, "--data.on_error=skip").status == "ok"
    assert "1 of 12" in lab.finding("data set", *flags, "--data.on_error=skip").found


def test_sound_things_are_ok(lab: Lab) -> None:
    assert installed(lab, "2.9.0", "torch==2.9.0").status == "ok"
    assert gpus.compare_cuda("gpu", "12.6", (12, 4), "/nowhere").status == "ok"
    roomy = Limits(None, 8 * GIB, "cgroup v2")
    assert limited(container.memory, roomy, "--trainer.devices=2").status == "ok"
    assert memory(lab, WIDE, 80, on_gpu=True).status == "ok"
    assert lab.finding("data", images(lab), NET).status == "ok"
    assert lab.finding("data set", images(lab), NET).status == "ok"
    assert "1,437 train" in lab.finding("data set", "--data.root=digits", NET).found
    assert lab.finding("model memory", images(lab), NET).status == "ok"
    assert lab.finding("output", f"--run.output={lab.s3.url('run')}").status == "ok"
    assert lab.finding("clock", f"--run.output={lab.s3.url('run')}").status == "ok"
    assert wandb_key(lab, "a" * 40).status == "ok"


def test_ranks_exchange(lab: Lab) -> None:
    for _ in range(3):
        finding = lab.finding("all-reduce", "--trainer.devices=2", "--trainer.accelerator=cpu")
        if "still importing torch" not in finding.found:
            break
    assert finding.status == "ok", finding
    assert "all-reduce OK (gloo, 2 ranks)" in finding.found


def test_ranks_that_have_not_started_are_no_failure_of_the_network() -> None:
    slow = allreduce._run([{}], "1 rank", False, 0.01)
    assert slow.status == "warn"
    assert "a rank is still importing torch" in slow.found
    for progress, status in {
        "imported\n": "fail",  # cannot connect
        "imported\nconnected\n": "warn",  # the other ranks are late
        "imported\nconnected\nall started\n": "fail",  # hangs
    }.items():
        assert allreduce._late("no result", [progress]).status == status


def test_nodes_that_run_the_doctor_meet(lab: Lab) -> None:
    there = endpoint("127.0.0.1", True)
    found: list[Finding] = []
    host = threading.Thread(target=lambda: found.append(rendezvous.meet(there, 20.0)))
    host.start()
    knocked = rendezvous.meet(endpoint("127.0.0.1", False, there.port), 20.0)
    host.join()
    assert knocked.status == "ok", knocked
    assert found[0].status == "ok", found
    assert "1 of 1 nodes connected" in found[0].found


def first_samples(root: str, *flags: str) -> FirstSamples:
    return samples.first_samples(context(f"--data.root={root}", *flags))


def packed(lab: Lab) -> str:
    source = put(str(lab.path / "source"), little_set())
    assert cli.main(["pack", source, str(lab.path / "packed")]) == 0
    return str(lab.path / "packed")


def one_file(lab: Lab, name: str, data: bytes) -> str:
    return f"{put(str(lab.path), {name: data})}/{name}"


LAYOUTS: dict[str, tuple[Callable[[Lab], str], str, bool]] = {
    # Name -> (what makes it, what it is called, whether images can be looked at).
    "class folders": (lambda lab: put(lab.s3.url("x"), little_set()), "one file an image", True),
    "a zip": (lambda lab: one_file(lab, "x.zip", zipped(little_set())), "one file an image", True),
    "a tar": (lambda lab: one_file(lab, "x.tar", tarred(little_set())), "tar shards", True),
    "a gzipped tar": (lambda lab: one_file(lab, "x.tgz", tarred(little_set(), gzipped=True)),
                      "a gzipped tar", True),
    "WebDataset": (lambda lab: put(lab.s3.url("x"), webdataset(little_set())), "tar shards", True),
    "Parquet": (lambda lab: put(lab.s3.url("x"), parquet(little_set())), "Parquet", False),
    "CIFAR": (lambda lab: put(str(lab.path), cifar10(cifar_pixels(50), cifar_pixels(10))),
              "a CIFAR python archive", False),
    "packed shards": (packed, "packed shards", True),
    "digits": (lambda lab: "digits", "the embedded digits", True),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_samples_of_every_layout(layout: str, lab: Lab) -> None:
    make, told, has_images = LAYOUTS[layout]
    first = first_samples(make(lab))
    assert first.layout.startswith(told)
    assert first.size_px(DataConfig(root="")) == (8 if has_images else None)
    assert sum(len(data) for data in storage.read_spans(first.spans) if isinstance(data, bytes))
    if first.whole_bytes is None:
        images = first.images if layout == "digits" else list(little_set().values())
        mean = 3073 if layout == "CIFAR" else sum(map(len, images)) / len(images)
        assert first.image_bytes is not None
        # What Parquet keeps beside images weighs much with two little ones in a row group.
        assert mean * 0.7 < first.image_bytes < mean * (4 if layout == "Parquet" else 1.3)


def test_an_archive_that_is_fetched_whole_is_not_fetched(lab: Lab) -> None:
    lab.env.setenv("LIGHTSHIP_CACHE", str(lab.path / "cache"))
    url = put(lab.s3.url("x"), {"set.tar": tarred(little_set())}) + "/set.tar"
    first = first_samples(url, f"--data.root_md5={'0' * 32}")
    assert first.layout == "an archive"
    assert first.whole_bytes == storage.size_bytes(url)
    assert not (lab.path / "cache").exists()


def test_a_large_set_is_not_listed(lab: Lab) -> None:
    """Of 1,200 objects, more than a page of a listing, a few are asked for."""
    with FaultProxy(lab.s3.endpoint) as proxy:
        root = lab.s3.url("images")
        (image,) = list(little_set(("train",), 1, ("ant",)).values())
        put(root, {f"train/ant/{index:04d}.png": image for index in range(1200)})
        lab.env.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        first = first_samples(root)
        assert proxy.requests.total() < 30, proxy.requests
        assert len(first.spans) <= 256


def two_layers(classes: int) -> nn.Module:
    layers = [nn.Linear(3 * 32 * 32, 1000), nn.ReLU(), nn.Linear(1000, classes)]
    return nn.Sequential(nn.Flatten(), *layers)


def test_memory_is_counted_to_the_byte() -> None:
    config = context(f"--model.net={__name__}:two_layers").config
    found = dry_run.measure(config, 32, 10, torch.device("cpu"))
    numbers = 3072 * 1000 + 1000 + 1000 * 10 + 10
    assert found.parameters == numbers
    assert found.image_bytes == 4 * (3072 + 1000)  # each layer's input
    adam = 2 * 4 * numbers
    assert found.fixed_bytes == pytest.approx(2 * 4 * numbers + adam + 4 * numbers * 1, rel=1e-4)
    assert found.eval_image_bytes == 4 * 2 * 3072  # the input, flattened
    assert found.images_per_s
    assert found.images_per_s > 0


def test_a_doctor_leaves_nothing(lab: Lab) -> None:
    url = lab.s3.url("run")
    for name in ("output", "clock"):
        assert lab.finding(name, f"--run.output={url}").status == "ok"
        assert lab.finding(name, f"--run.output={lab.path}/new/run").status == "ok"
    with pytest.raises(storage.NotFound):
        storage.list_files(url)
    assert list(lab.path.iterdir()) == []


def test_a_check_that_hangs_or_breaks_does_not_take_the_others_with_it(capsys) -> None:
    never = threading.Event()

    def hang(_: Context) -> Finding:
        never.wait()
        return Finding("ok", "too late")

    def refuse(_: Context) -> Finding:
        raise LightshipError("no")

    checks = [
        Check("hangs", hang, "harm", "fix it", deadline_s=0.2),
        Check("late is no harm", hang, "harm", "fix it", deadline_s=0.2, if_late="warn"),
        Check("late is skipped", hang, "harm", "fix it", deadline_s=0.2, if_late="skipped"),
        Check("breaks", lambda _: Finding(1 / 0), "harm", "fix it"),  # type: ignore[arg-type]
        Check("refuses", refuse, "harm", "fix it"),
        Check("is well", lambda _: Finding("ok", "fine"), "", ""),
    ]
    findings = {check.name: finding for check, finding in run(checks, context())}
    late = "no answer within 0.2 s"
    assert findings["hangs"] == Finding("fail", late, "harm", "fix it")
    assert findings["late is no harm"] == Finding("warn", late, "if it fails: harm", "fix it")
    assert findings["late is skipped"] == skipped(late)
    assert findings["breaks"].status == "fail"
    assert "ZeroDivisionError" in findings["breaks"].found
    assert "Traceback" in capsys.readouterr().err
    assert findings["refuses"] == Finding("fail", "no", "harm", "fix it")
    assert findings["is well"] == Finding("ok", "fine")
    never.set()


def test_a_slow_import_is_the_fault_of_its_own_check_alone() -> None:
    imported = threading.Event()
    checks = [check for check in CHECKS if check.name in ("imports", "GPU driver", "CPU")]
    at = context(load=lambda: imported.wait() and None)
    at.started_s -= 60
    findings = {check.name: finding for check, finding in run(checks, at)}
    imported.set()
    assert findings["imports"].status == "fail"
    assert findings["imports"].found == "no answer within 20 s"
    for name in ("GPU driver", "CPU"):
        assert findings[name] == skipped("lightship is still being imported, see imports")


def test_what_cannot_be_imported_is_a_reason_to_skip() -> None:
    def load() -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    checks = [Check("x", lambda _: Finding("ok", "fine"), "", "")]
    [(_, finding)] = run(checks, context(load=load))
    assert finding.status == "skipped"
    assert "libcudart" in finding.found


def test_all_that_a_fit_imports_is_imported() -> None:
    checks = [check for check in CHECKS if check.name == "imports"]
    [(_, finding)] = run(checks, context(load=import_fit))
    assert finding.status == "ok"


def test_a_fact_is_computed_once_for_all_threads() -> None:
    calls: list[int] = []

    def count(_: Context) -> int:
        calls.append(1)
        return len(calls)

    shared = context()
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(shared.once(count))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


FINDINGS = {"short": Finding("ok", "this", "that"), "a longer name": Finding("fail", "x", "y", "z"),
            "last": skipped("because")}  # fmt: skip


def printed(capsys, log_format: Any) -> str:
    with render.table(list(FINDINGS), log_format) as show:
        for name, finding in FINDINGS.items():
            show(name, finding)
    return capsys.readouterr().out


def test_lines_are_aligned(capsys) -> None:
    assert printed(capsys, "auto").splitlines() == [
        "ok       short          this: that",
        "fail     a longer name  x: y",
        "                        fix: z",
        "skipped  last           because",
    ]


def test_a_terminal_has_a_table() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with render.table(list(FINDINGS), "auto", stream) as show:
        for name, finding in FINDINGS.items():
            show(name, finding)
    text = stream.getvalue()
    assert "\x1b[" in text
    for word in ("what it means", "a longer name", "because", "skipped", "z"):
        assert word in text


def test_json_lines_hold_everything(capsys) -> None:
    facts = [json.loads(line) for line in printed(capsys, "json").splitlines()]
    assert [fact["check"] for fact in facts] == list(FINDINGS)
    assert {key: facts[1][key] for key in ("status", "found", "means", "fix")} == {
        "status": "fail", "found": "x", "means": "y", "fix": "z",
    }  # fmt: skip
    assert all(fact["time"] and fact["event"] == "check" for fact in facts)
