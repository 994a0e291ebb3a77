"""The metrics table and W&B: read back what a real short fit leaves on disk."""

import base64
import csv
import http.server
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from lightship import storage
from lightship.config import Config, RunConfig
from lightship.errors import ConfigError, Preempted
from lightship.run.folder import RunFolder
from lightship.tracking.background import Background
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.tracking.mirror import Mirror
from lightship.tracking.service import find_service, ignore_workspace_settings
from lightship.tracking.settings import read_settings
from lightship.tracking.start import is_run_id, prepare_tracking, run_id, start_tracking
from lightship.training.callbacks.image_predictions import ImagePredictionLogger
from lightship.training.callbacks.throughput import Throughput
from tests.support.little_fit import CLASSES, batch_of, fit
from tests.support.wandb_file import read_wandb_file

KEY = "a" * 40


@pytest.fixture(autouse=True)
def no_wandb_settings(monkeypatch, tmp_path):
    """No key, netrc or setting of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers


@pytest.fixture(autouse=True)
def lines(caplog):
    """What tracking has logged so far."""
    with caplog.at_level(logging.INFO, "lightship.tracking"):
        yield lambda: [r.getMessage() for r in caplog.records if "tracking" in r.name]


def start(tmp_path, mode="auto", **options):
    config = {
        "optim": {"lr": 0.001}, "run": {"seed": 0}, "environment": {"git_commit": "f00d"}
    }  # fmt: skip
    tracker = start_tracking(
        prepare_tracking(mode, tmp_path / "scratch"), "shop", "abcd1234", "run-name", config,
        init_timeout_s=3, **options,
    )  # fmt: skip
    if tracker:
        tracker.wait_for_start()
    return tracker


def table_on_disk(url):
    return list(csv.DictReader(io.StringIO(storage.read_bytes(url).decode())))


def test_an_offline_run_of_a_real_fit_reads_back(tmp_path, capfd, lines):
    tracker = start(tmp_path)
    batch, table = batch_of(7), MetricsCSV(str(tmp_path / "out"))
    looking = ImagePredictionLogger(batch.images, batch.labels, batch.ids + 40, CLASSES, tracker)
    trainer = fit([Throughput(6, 2), looking], [table, tracker])
    tracker.log_confusion(np.eye(3, dtype=int), CLASSES)
    tracker.finish(0)

    [line] = lines()
    assert "offline (no key" in line
    assert line.endswith(f"wandb sync {tracker.run_path}")
    captured = capfd.readouterr()
    assert "wandb" not in (captured.out + captured.err).lower()

    [path] = tracker.run_path.glob("*.wandb")
    found = read_wandb_file(path)
    assert (found.run_id, found.project, found.exit_code) == ("abcd1234", "shop", 0)
    assert found.config["optim"] == {"lr": 0.001}
    assert found.config["environment"] == {"git_commit": "f00d"}
    assert found.x_axes == {"*": "trainer/global_step"}
    steps = [row["trainer/global_step"] for row in found.history]
    assert steps == sorted(steps)
    logged = {row["trainer/global_step"]: row["train/loss"] for row in found.history
              if "train/loss" in row}  # fmt: skip
    on_disk = {int(row["step"]): row for row in table_on_disk(table.url)}
    assert list(logged) == list(on_disk) == [2, 4, 6, 8]
    for step, loss in logged.items():
        assert float(on_disk[step]["train/loss"]) == loss
    val_steps = [row["trainer/global_step"] for row in found.history if "val/acc" in row]
    assert val_steps == [4, 8] == [s for s, row in on_disk.items() if row["val/acc"]]

    [_, second] = [row for row in found.history if "val/predictions/filenames" in row]
    captions = second["val/predictions/captions"]
    assert len(captions) == len(batch.labels)
    best = trainer.lightning_module.probabilities(batch.images).max(1)
    for index, caption in enumerate(captions):
        guess, true = CLASSES[best.indices[index]], CLASSES[batch.labels[index]]
        said = f"pred: {guess} {best.values[index]:.2f} | true: {true} | #{40 + index}"
        assert caption == said
    picture = tracker.run_path / "files" / second["val/predictions/filenames"][1]
    expected = batch.images[1].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(picture).convert("RGB")), expected)
    confusion = [row for row in found.history if "test/confusion_table/path" in row]
    table_path = tracker.run_path / "files" / confusion[0]["test/confusion_table/path"]
    assert json.loads(table_path.read_text())["data"][0] == ["ant", "ant", 1]


@pytest.mark.parametrize("step", [10**7 + 1, 123_456_789, 2**40])
def test_numbers_are_written_as_they_are(tmp_path, step):
    table = MetricsCSV(str(tmp_path))
    table.log_metrics({"train/loss": 1 / 3, "lr": 1e-300, "throughput/images_per_s": 1e20}, step)
    table.finalize()
    [row] = table_on_disk(table.url)
    assert row["step"] == str(step)
    assert float(row["train/loss"]) == 1 / 3
    assert float(row["lr"]) == 1e-300
    assert float(row["throughput/images_per_s"]) == 1e20


def test_a_restart_goes_on_under_the_same_id_and_marks_preemption(tmp_path):
    for exit_code in (143, 0):
        tracker = start(tmp_path, "offline")
        tracker.log_metrics({"val/acc": 0.5}, 5)
        tracker.log_metrics({"val/acc": 0.5}, 4)  # Lightning's step of a validation
        tracker.finish(exit_code)
        [path] = tracker.run_path.glob("*.wandb")
        found = read_wandb_file(path)
        assert (found.run_id, found.exit_code) == ("abcd1234", exit_code)
        assert [row["trainer/global_step"] for row in found.history] == [5, 5]


def wandbs_threads() -> list[threading.Thread]:
    """Those alive. Where its settings are wrong, wandb leaves one of its own behind for good."""
    return [t for t in threading.enumerate() if re.search("wandb|otel", t.name, re.IGNORECASE)]


@pytest.mark.parametrize("server", ["refuses", "silent"])
def test_a_server_that_does_not_answer_means_offline(tmp_path, monkeypatch, server, lines):
    before = wandbs_threads()
    with socket.create_server(("127.0.0.1", 0)) as listening:  # accepts, and says nothing
        if server == "silent":
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        tracker = start(tmp_path)
        assert tracker.offline
        tracker.log_metrics({"val/acc": 0.5}, 1)
        tracker.finish(0)
        base_url = os.environ["WANDB_BASE_URL"]
        assert len(lines()) == 1
        assert f"offline ({base_url}" in lines()[0]
        assert not set(wandbs_threads()) - set(before)


def test_who_only_reads_the_settings_leaves_no_thread(monkeypatch):
    before = wandbs_threads()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    known = read_settings("auto")
    assert (known.api_key, known.base_url) == (KEY, os.environ["WANDB_BASE_URL"])
    assert not set(wandbs_threads()) - set(before)


def test_a_key_in_netrc_counts(tmp_path, monkeypatch, lines):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
    netrc.chmod(0o600)
    tracker = start(tmp_path)
    tracker.finish(0)
    assert "offline (http://127.0.0.1:9: " in lines()[0]  # it tried


def test_without_wandb_none_works_and_auto_names_the_flag(tmp_path):
    code = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "wandb":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from lightship.errors import ConfigError, Preempted
from lightship.tracking.start import prepare_tracking, start_tracking
folder, arguments = Path(sys.argv[1]), ("p", "id", "n", {})
assert start_tracking(prepare_tracking("none", folder), *arguments) is None
assert not list(Path(sys.argv[1]).iterdir())
try:
    start_tracking(prepare_tracking("auto", folder), *arguments)
except ConfigError as error:
    print(error)
"""
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "empty")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--run.tracking none" in done.stdout
    assert issubclass(ConfigError, ValueError)


def test_a_wrong_wandb_variable_is_the_users_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ConfigError, match="'onlin'"):
        start(tmp_path)


def test_a_preparation_without_a_run_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    preparation = prepare_tracking("offline", tmp_path)
    folders, _ = preparation.ready.result(60)
    assert list((tmp_path / "temporary").iterdir()) == [folders._made_path]
    preparation.close()
    assert not list((tmp_path / "temporary").iterdir())


LONG = "a" * 129


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("WANDB_MODE", "", "WANDB_MODE: ''"),
        ("WANDB_BASE_URL", "nonsense", "WANDB_BASE_URL: 'nonsense'"),
        ("WANDB_RUN_ID", "a/b", "WANDB_RUN_ID: "),
        ("WANDB_RUN_ID", " ", "WANDB_RUN_ID: "),
        ("WANDB_PROJECT", "a/b", "WANDB_PROJECT: "),
        ("WANDB_TAGS", "x,,y", "WANDB_TAGS: "),
        ("WANDB_INIT_TIMEOUT", "abc", "WANDB_INIT_TIMEOUT: 'abc'"),
        ("WANDB_SERVICE", "garbage", "WANDB_SERVICE: "),
    ],
)
def test_a_variable_that_wandb_refuses_is_named(tmp_path, monkeypatch, variable, value, named):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as raised:
        start(tmp_path)
    assert str(raised.value).startswith(f"W&B refuses {named}")
    assert "pydantic" not in str(raised.value)


def test_a_token_file_that_is_not_there_is_the_users_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"WANDB_IDENTITY_TOKEN_FILE .*token cannot be read"):
        start(tmp_path)


@pytest.mark.parametrize("project", ["a/b", "", " ", LONG])
def test_a_project_that_wandb_refuses_is_the_users_error(tmp_path, project):
    with pytest.raises(ConfigError, match=r"--run\.project"):
        start_tracking(prepare_tracking("offline", tmp_path), project, "id", "name", {})


@pytest.mark.parametrize("name", [LONG * 3, "", "a\udcffb", "caf\u00e9 / \u6f22"])
def test_any_name_of_an_output_will_do(tmp_path, name):
    config = {"run": {"output": name}}
    tracker = start_tracking(prepare_tracking("offline", tmp_path), "shop", "id", name, config)
    tracker.finish(0)
    [path] = tracker.run_path.glob("*.wandb")
    assert read_wandb_file(path).exit_code == 0


@pytest.mark.parametrize("text", ["a/b", "", " a", "a\n", "a\x00b", "\ufffd", "a:b", LONG])
def test_a_stored_id_that_is_damaged_is_none(text):
    assert run_id(text) != text
    assert not is_run_id(text)


@pytest.mark.parametrize("text", ["model.v2-a_1", "two words", "caf\u00e9", "x" * 128])
def test_ids_that_wandb_takes_are_kept_by_a_run(tmp_path, text):
    folder = RunFolder(Config(run=RunConfig(output=str(tmp_path / "run"))))
    tracker = start_tracking(prepare_tracking("offline", tmp_path), "shop", text, "name", {})
    tracker.finish(0)
    folder.keep_tracking_id(text)
    assert run_id(folder.tracking_id(is_run_id)) == text
    assert not list(tmp_path.rglob("*.damaged"))


def test_the_project_and_name_of_the_environment(tmp_path, monkeypatch):
    def started(project):
        tracker = start_tracking(
            prepare_tracking("offline", tmp_path), project, run_id(), "mine", {}
        )
        tracker.finish(0)
        [path] = tracker.run_path.glob("*.wandb")
        found = read_wandb_file(path)
        return found.project, found.name

    assert started(None) == ("lightship", "mine")
    monkeypatch.setenv("WANDB_PROJECT", "shop")
    monkeypatch.setenv("WANDB_NAME", "wished")
    assert started(None) == ("shop", "wished")
    assert started("flagged") == ("flagged", "wished")


def test_a_wandb_key_with_a_newline_is_the_users_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY + "\n")
    with pytest.raises(ConfigError, match="whitespace"):
        start(tmp_path)


def test_many_classes_become_a_table_of_pairs(tmp_path):
    tracker = start(tmp_path, "offline")
    confusion = np.diag([5] * 60)
    confusion[3, 4], confusion[1, 2] = 7, 9
    tracker.log_confusion(confusion, [f"class {index}" for index in range(60)])
    tracker.finish(0)
    [path] = tracker.run_path.glob("files/media/table/**/*.json")
    table = json.loads(path.read_text())
    assert table["data"] == [["class 1", "class 2", 9], ["class 3", "class 4", 7]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_or_hangs_costs_a_line_and_no_run(tmp_path, monkeypatch, number, lines):
    monkeypatch.setattr("lightship.tracking.tracker._FINISH_MARGIN_S", 0.0)
    tracker = start(tmp_path, "offline", finish_timeout_s=2)
    service = find_service()
    os.kill(service.pid, number)
    for step in range(500):  # more than the socket holds
        tracker.log_images("val/predictions", [np.zeros((9, 9, 3), np.uint8)] * 4, "abcd", step)
        tracker.log_metrics({f"val/{name}": 0.5 for name in range(99)}, step)
    tracker.finish(0)
    [_, line] = lines()
    assert re.match(r"W&B failed to (log|log images|finish) \(", line)
    assert str(tracker.run_path) in line
    assert "\n" not in line
    assert service.poll() is not None  # the end of this process will not wait for it
    tracker.log_metrics({"val/acc": 0.5}, 501)
    tracker.finish(0)
    assert len(lines()) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space"), SystemExit(3), RuntimeError("a\nb")])
@pytest.mark.parametrize("where", ["wandb.init", "wandb.setup", "wandb.sdk.wandb_run.Run.log"])
def test_whatever_wandb_raises_costs_a_line(tmp_path, monkeypatch, where, error, lines):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, fail)
    tracker = start(tmp_path, "offline")
    if tracker:
        tracker.log_metrics({"val/acc": 0.5}, 1)
        tracker.finish(0)
    assert (tracker is None) == where.endswith("setup")
    expected = {"setup": "cannot be started", "init": "failed to start", "log": "failed to log"}
    assert f"W&B {expected[where.rpartition('.')[2]]} (" in lines()[-1]
    assert "\n" not in lines()[-1]


@pytest.fixture
def late_start(monkeypatch):
    """A start of a run that waits until the event is set."""
    import wandb

    event, init, is_over = threading.Event(), wandb.init, False

    def wait_and_init(**options):
        event.wait()
        if is_over:
            raise RuntimeError("the test has ended")
        return init(**options)

    monkeypatch.setattr("wandb.init", wait_and_init)
    yield event
    is_over = True
    event.set()


def offline_tracker(tmp_path):
    return start_tracking(prepare_tracking("offline", tmp_path), "shop", "abcd1234", "name", {})


def test_training_does_not_wait_for_the_start_of_a_run(tmp_path, late_start, lines):
    tracker = offline_tracker(tmp_path)
    assert (tracker.name, tracker.version) == ("shop", "abcd1234")
    tracker.log_metrics({"train/loss": 1.5}, 1)
    tracker.log_images("val/predictions", [np.zeros((9, 9, 3), np.uint8)], ["a"], 2)
    tracker.finalize("success")
    assert not lines()
    threading.Timer(0.2, late_start.set).start()
    tracker.finish(0)  # which does
    [path] = tracker.run_path.glob("*.wandb")
    found = read_wandb_file(path)
    assert [row["trainer/global_step"] for row in found.history] == [1, 2]
    assert found.exit_code == 0
    assert len(lines()) == 1


@pytest.mark.parametrize("exit_code", [1, 75, 143])
def test_who_does_not_end_well_does_not_wait_for_the_start_of_a_run(
    tmp_path, monkeypatch, late_start, lines, exit_code
):
    bounds_s, wait = [], Background.wait

    def noted(self, bound_s):
        bounds_s.append(bound_s)
        return wait(self, bound_s)

    tracker = offline_tracker(tmp_path)
    monkeypatch.setattr(Background, "wait", noted)
    tracker.finish(exit_code)
    assert not late_start.is_set()
    assert bounds_s[0] == 3.0
    assert lines() == ["W&B failed to finish (TimeoutError: it does not answer)"]


@pytest.mark.parametrize("exit_code", [0, 1, 143])
def test_an_offline_run_is_copied_to_a_remote_output_however_it_ends(tmp_path, exit_code, lines):
    url = f"memory://tracking-bucket/{exit_code}/logs/wandb"
    tracker = start(tmp_path, "offline", mirror_url=url)
    [line] = lines()
    tracker.log_metrics({"val/acc": 0.25}, 1)
    error = None if exit_code == 0 else Preempted("asked") if exit_code == 143 else KeyError("x")
    tracker.__exit__(type(error), error, None)
    [path] = tracker.run_path.glob("*.wandb")
    assert read_wandb_file(path).exit_code == exit_code
    copy = storage.join(url, tracker.run_path.name)
    assert storage.read_bytes(storage.join(copy, path.name)) == path.read_bytes()
    assert line.endswith(f"wandb sync {copy}")
    assert line.count("\n") == 0


def test_an_offline_run_is_copied_now_and_then_what_has_changed(tmp_path, monkeypatch):
    (tmp_path / "offline-run-1" / "files").mkdir(parents=True)
    (tmp_path / "offline-run-1" / "files" / "a.png").write_bytes(b"a")
    log_path = tmp_path / "offline-run-1" / "run.wandb"
    log_path.write_bytes(b"1")
    mirror = Mirror(tmp_path / "offline-run-1", "memory://mirror/run")
    mirror.copy()
    storage.remove(f"{mirror.url}/files/a.png")
    log_path.write_bytes(b"12")
    mirror.copy_if_due()  # not yet
    assert storage.read_bytes(f"{mirror.url}/run.wandb") == b"1"
    monkeypatch.setattr("time.monotonic", lambda now=time.monotonic: now() + 10**6)
    mirror.copy_if_due()
    assert storage.read_bytes(f"{mirror.url}/run.wandb") == b"12"
    assert not storage.exists(f"{mirror.url}/files/a.png")  # as it was
    assert mirror.error is None


def test_an_output_that_takes_no_copy_ends_nothing(tmp_path, lines):
    (tmp_path / "file").write_text("in the way")
    tracker = start(tmp_path, "offline", mirror_url=str(tmp_path / "file" / "wandb"))
    tracker.finish(0)
    assert len(lines()) == 2
    assert "offline run is incomplete at" in lines()[1]


def test_the_table_goes_on_from_the_checkpoints_rows(tmp_path):
    output = str(tmp_path)
    table = MetricsCSV(output, write_every_s=10**9)
    for step in (10, 20, 30):
        table.log_metrics({"train/loss": 1 / step, "epoch": step // 10}, step)
    assert not storage.exists(table.url)  # held back until it is time
    table.log_metrics({"val/acc": 0.5}, 29)  # Lightning's step of a validation: row 30
    table.finalize("success")
    rows = table_on_disk(table.url)
    assert list(rows[0]) == ["step", "epoch", "time_s", "train/loss", "val/acc"]
    assert [row["val/acc"] for row in rows] == ["", "", "0.5"]

    again = MetricsCSV(output, write_every_s=0)
    again.load_rows(table.rows[:2])  # as a checkpoint of step 20 has them
    assert [row["step"] for row in again.rows] == [10, 20]
    assert again.latest["train/loss"] == 0.05
    again.log_metrics({"train/loss": float("nan"), "lr": 0.1}, 25)
    rows = table_on_disk(again.url)
    assert [row["step"] for row in rows] == ["10", "20", "25"]
    assert rows[2]["train/loss"] == "nan"
    assert rows[1]["lr"] == ""
    times = [float(row["time_s"]) for row in rows]
    assert times == sorted(times)

    fresh = MetricsCSV(output)
    assert fresh.rows == []
    assert isinstance(fresh, Logger)


def test_only_rank_0_writes_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    table = MetricsCSV(str(tmp_path), write_every_s=0)
    table.log_metrics({"train/loss": 1.0}, 1)
    table.finalize("success")
    assert table.rows == []
    assert not storage.exists(table.url)


def test_the_run_id_of_the_environment_wins_then_the_stored(monkeypatch):
    new = run_id()
    assert len(new) == 8
    assert new.isalnum()
    assert run_id() != new
    assert run_id("stored") == "stored"
    monkeypatch.setenv("WANDB_RUN_ID", "wished")
    assert run_id("stored") == "wished"


def test_an_offline_run_on_a_full_disk_is_said_to_be_incomplete(tmp_path, monkeypatch, lines):
    tracker = start(tmp_path, "offline")
    monkeypatch.setattr("lightship.tracking.tracker.is_writable", lambda path: False)
    tracker.finish(0)
    assert lines()[1].startswith(f"the W&B offline run may be incomplete: {tracker.run_path}")


@pytest.fixture
def server():
    """Where W&B's server would be, and the headers of each request that it gets."""
    headers: list[dict[str, str]] = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            headers.append(dict(self.headers))
            self.send_error(500)

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", headers
        listening.shutdown()


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_the_key_does_not_go_where_a_file_of_the_working_directory_says(
    tmp_path, monkeypatch, lines, server, folder
):
    url, requests = server
    here = tmp_path / "untrusted"
    (here / folder).mkdir(parents=True)
    (here / folder / "settings").write_text(
        f"[default]\nbase_url = {url}\nhttp_proxy = {url}\nhttps_proxy = {url}\nmode = online\n"
    )
    (here / "config-defaults.yaml").write_text("planted: {value: 1}\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert read_settings("auto").base_url == os.environ["WANDB_BASE_URL"]
    monkeypatch.delenv("WANDB_BASE_URL")
    assert read_settings("auto").base_url != url
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # no request leaves this machine
    tracker = start(tmp_path)
    tracker.finish(0)
    assert not requests
    [path] = tracker.run_path.glob("*.wandb")
    assert "planted" not in read_wandb_file(path).config
    assert "is not read" in lines()[0]
    assert f"untrusted/{folder}/settings" in lines()[0]


def test_the_key_may_stand_in_a_file(tmp_path, monkeypatch, lines, server):
    url, requests = server
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "key"))
    start(tmp_path).finish(0)
    assert f"WANDB_API_KEY_FILE {tmp_path / 'key'} cannot be read" in lines()[0]
    (tmp_path / "key").write_text(f"{KEY}\n")
    start(tmp_path).finish(0)
    login = base64.b64encode(f"api:{KEY}".encode()).decode()
    assert requests[0]["Authorization"] == f"Basic {login}"
    assert "WANDB_API_KEY" not in os.environ
    assert KEY not in "".join(lines())


@pytest.mark.parametrize("file", ["wandb/settings", ".wandb/settings", "config-defaults.yaml"])
def test_a_wandb_that_would_read_the_working_directory_is_not_started(file, tmp_path, monkeypatch):
    """As a newer version might, in which the names that are replaced are gone."""
    from wandb.sdk.wandb_config import Config

    monkeypatch.chdir(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("x")
    monkeypatch.delattr(Config, "_load_defaults")
    with pytest.raises(ConfigError, match=r"would read .*set --run.tracking none"):
        ignore_workspace_settings()
