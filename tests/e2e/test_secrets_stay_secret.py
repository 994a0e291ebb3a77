"""Secrets planted in every input are in nothing that a command writes, prints or starts.

Each test runs a command of one story (fit, resume, test, predict, ...) and then looks through all
files that the commands have left, archives unpacked, through all that they printed, and through the
command lines and environments of the processes that they started.
"""

import http.server
import io
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

from lightship import cli
from lightship.data.streaming.worker_process import Worker
from tests.support import planted, warm
from tests.support.images import little_set, zipped
from tests.support.own_nets import pooled_linear

USER, PASSWORD = "somebody", "pwS3CR3T7"
LOGIN = planted.basic(USER, PASSWORD)
KEY = "S3CR3T7" + "a" * 33
VARIABLES = {
    "WANDB_API_KEY": KEY,
    "WANDB_BASE_URL": "http://nobody:envS3CR3T@127.0.0.1:9",
    "AWS_ACCESS_KEY_ID": "AKIDS3CR3T777",
    "AWS_SECRET_ACCESS_KEY": "/awsS3CR3T+key/",
    "AWS_SESSION_TOKEN": "tokenS3CR3T//7==",
    "HF_TOKEN": "hf_S3CR3T77777",
}
NET = "tests.support.own_nets:pooled_linear"
ROOT = Path(__file__).parents[2]
NETS = '''
"""A net whose training fails with a URL in its text and its variables."""
import os
from torch import nn


class Broken(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.last, self.calls = nn.Linear(48, num_classes), 0

    def forward(self, images):
        self.calls += self.training
        if self.calls > 6:  # lightship calls it before training too
            url = os.environ["MY_URL"]
            print("reading", url)
            raise RuntimeError(f"cannot read {url}")
        return self.last(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))


def broken(num_classes):
    return Broken(num_classes)
'''


class Web(http.server.BaseHTTPRequestHandler):
    """Serves files to who has the password and a signature; knows ranges."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        at = urlsplit(self.path)
        content = self.files.get(at.path)
        if self.headers["Authorization"] != LOGIN or "S3CR3T" not in "".join(
            parse_qs(at.query).get("X-Amz-Signature", [])
        ):
            return self.send_error(403, f"no access with {self.path}")
        if content is None:
            return self.send_error(404, f"nothing at {self.path}")
        start, end = 0, len(content)
        if asked := self.headers["Range"]:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(end, int(last) + 1 if last else end)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:end])

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


class Story:
    """A folder in which commands run, what they printed, and what their children showed."""

    def __init__(self, path: Path, port: int) -> None:
        self.path, self.port, self.printed = path, port, ""
        self.run = str(path / "run")
        self.shown: list[bytes] = []
        for name in ("home", "tmp", "here", "notes"):
            (path / name).mkdir()
        (path / "here" / "broken_nets.py").write_text(NETS)
        kept = {name: text for name, text in os.environ.items() if "WANDB" not in name}
        self.variables = {
            **kept, **VARIABLES, "HOME": str(path / "home"), "TMPDIR": str(path / "tmp"),
            "XDG_CACHE_HOME": str(path / "home" / "cache"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{path}/here:{ROOT}", "MY_URL": self.url("data.bin", "own"),
            "PET_LOG_DIR": str(path / "agent"), "PET_MAX_RESTARTS": "0",
            warm.NOTES: str(path / "notes"),
        }  # fmt: skip

    def url(self, file: str, signature: str = "") -> str:
        """A URL with all that may be secret in one."""
        query = (
            f"X-Amz-Credential=AKS3CR3T7%2F2026&X-Amz-Date=2026{signature}&id=7"
            f"&X-Amz-Security-Token=tokS3CR3T{signature}&X-Amz-Signature=sigS3CR3T{signature}"
        )
        return f"http://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{file}?{query}"

    def root(self, signature: str = "one") -> str:
        return f"zip://::{self.url('images.zip', signature)}"

    def lightship(self, *arguments: str) -> tuple[int, str]:
        """Run a command and keep what it shows; (exit code, what it printed)."""
        pid_path = self.path / "notes" / "pid"
        pid_path.unlink(missing_ok=True)
        process = subprocess.Popen(
            [warm.executable(), *arguments], cwd=self.path / "here",
            env=self.variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.append(process.stdout.read()))
        reader.start()
        while process.poll() is None:
            if pid_path.exists():
                self._look(int(pid_path.read_text()))
            time.sleep(0.05)
        reader.join()
        self.printed += output[0]
        return process.returncode, output[0]

    def _look(self, pid: int) -> None:
        """Keep what any user can read of the children, and what they hand on to theirs.

        Without a child that has not begun yet, and still shows the command line of its parent.
        """
        for child in planted.children(pid):
            try:
                typed = Path(f"/proc/{pid}/cmdline").read_bytes()
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                given = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if command == typed:
                continue
            is_rank = b"\0-m\0lightship\0" in command
            is_worker = b"streaming.worker" in command
            allowed = [*VARIABLES, "MY_URL", *["LIGHTSHIP_ARGUMENTS"] * is_rank]
            if is_worker:
                allowed = [name for name in allowed if not name.startswith("WANDB")]
            names = tuple(f"{name}=".encode() for name in allowed)
            self.shown += [command, *(each for each in given if not each.startswith(names))]

    def assert_clean(self) -> None:
        forms = (LOGIN.partition(" ")[2],)
        assert planted.finds(self.printed.encode(), forms) == []
        assert planted.in_files(self.path, forms) == {}
        assert [each for each in set(self.shown) if planted.finds(each, forms)] == []


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    weights = io.BytesIO()
    torch.save(pooled_linear(3).state_dict(), weights)
    config = "data:\n  val_fraction: 0.25\nmodel:\n  weights: {url}\n"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        story = Story(tmp_path_factory.mktemp("story"), server.server_port)
        images = little_set(("train", "test"), per_class=8)
        Web.files = {
            "/images.zip": zipped(images),
            "/weights.pth": weights.getvalue(),
            "/config.yaml": config.format(url=story.url("weights.pth")).encode(),
        }
        yield story
        server.shutdown()


def fit_flags(story: Story, signature: str, *more: str) -> list[str]:
    return [
        "fit", "--config", story.url("config.yaml", signature),
        "--data.root", story.root(signature),
        f"--run.output={story.run}", "--run.tracking=offline", "--run.log_format=json",
        "--data.mode=streaming", "--data.global_batch_size=6", "--run.log_images=2",
        f"--model.net={NET}", *more,
    ]  # fmt: skip


def as_events(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_fit_and_its_restart_with_another_signature(story: Story) -> None:
    code, text = story.lightship(*fit_flags(story, "one", "--trainer.max_epochs=1"))
    assert code == 0, text
    assert as_events(text)
    assert list(story.path.glob("run/logs/wandb/*/*.wandb"))
    story.assert_clean()
    code, text = story.lightship(*fit_flags(story, "two", "--trainer.max_epochs=2"))
    assert code == 0, text
    assert "from step 3" in text
    assert len(list(story.path.glob("run/data/manifest-*.table"))) == 1
    story.assert_clean()


def test_a_fit_of_another_place_is_refused_without_its_secrets(story: Story) -> None:
    other = story.root("three").replace("id=7", "id=8")
    code, text = story.lightship(*fit_flags(story, "two"), f"--data.root={other}")
    assert code == 78, text
    assert "id=7" in text
    assert "id=8" in text
    story.assert_clean()


def test_commands_on_the_run_take_the_secrets_from_the_command_line(story: Story) -> None:
    of_run = f"--run.output={story.run}"
    for command in ("test", "predict", "fit"):
        code, text = story.lightship(command, of_run, "--config", f"{story.run}/config.yaml")
        assert code == 78
        [line] = as_events(text)
        assert "give --data.root with them" in line["text"]
    of_run, root = [of_run, f"--model.net={NET}"], f"--data.root={story.root('four')}"
    for flags in (["test", *of_run, root], ["predict", *of_run, root], ["export", *of_run]):
        code, text = story.lightship(*flags)
        assert code == 0, text
    assert (story.path / "run" / "predictions.csv").read_text().count("\n") == 1 + 48
    story.assert_clean()


def test_pack_and_doctor(story: Story) -> None:
    code, text = story.lightship("pack", story.root(), str(story.path / "packed"))
    assert code == 0, text
    assert "***" in (story.path / "packed" / "pack.json").read_text()
    _, text = story.lightship("doctor", f"--data.root={story.root()}", f"--run.output={story.run}2")
    assert "data set" in text
    story.assert_clean()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_of_a_net_that_has_the_url(story: Story, log_format: str) -> None:
    flags = [
        "fit", "--data.root", story.root(), f"--run.output={story.path}/broken-{log_format}",
        "--run.tracking=none", "--model.net=broken_nets:broken", "--data.global_batch_size=8",
        f"--run.log_format={log_format}", "--trainer.devices=2", "--trainer.accelerator=cpu",
        "--data.mode=streaming",
    ]  # fmt: skip
    code, text = story.lightship(*flags)
    assert code == 1, text
    assert "cannot read http://***@127.0.0.1" in text
    if log_format == "json":
        assert {"output", "error"} <= {event["event"] for event in as_events(text)}
    assert list(story.path.glob("agent/**/error.json")), "torch's error files stay"
    story.assert_clean()


WRONG = [
    ["fit", "--data.global_batch_size", "{url}"],
    ["fit", "--data.rot={url}"],
    ["fit", "--run.log_format={url}"],
    ["{url}"],
    ["fit", "--config", "{url}"],
    ["fit", "--data.root={raw}"],
    ["fit", "--data.root={url}", "--print_config"],
    ["fit", "--data.root={raw}", "--print_config"],
    ["fit", "--run.output={url}"],
    ["fit", "--model.net", "{url}"],
    ["fit", "--model.weights", "{raw}"],
    ["fit", "--data.root=zip://::{raw}"],
    ["predict", "--ckpt_path=x.ckpt", "--predictions", "{url}"],
    ["predict", "--ckpt_path=x.ckpt", "--predictions", "{url}.csv"],
    ["predict", "--ckpt_path={url}", "--predictions", "x.csv"],
    ["export", "--ckpt_path={raw}", "--export", "x.pt2"],
    ["test", "--run.output={url}"],
    ["pack", "{url}", "packed"],
    ["pack", "digits", "{url}"],
    ["pack", "digits", "packed", "--threads={url}"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_input_is_refused_without_its_secrets(
    arguments: list[str], story: Story, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "1")
    url = story.url("missing.zip")
    raw = url.replace(PASSWORD, f"a@b/c:d?{PASSWORD}")
    code = cli.main([each.format(url=url, raw=raw) for each in arguments])
    Worker.stop()
    printed = capsys.readouterr()
    assert (code == 0) == ("--print_config" in arguments)
    assert printed.out or printed.err
    assert planted.finds((printed.out + printed.err).encode(), (LOGIN.partition(" ")[2],)) == []
    assert planted.in_files(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [
        'data: {root: "https://u:pw"S3CR3T@h/x.zip?sig=yS3CR3T7"}',
        "data:\n  root: [https://u:pw S3CR3T7@h/x.zip, b]",
        "data:\n  global_batch_size: https://u:pw S3CR3T7@h/x.zip",
        "data:\n  https://u:pw S3CR3T7@h/x.zip: 1",
        "data: https://u:pw S3CR3T7@h/x.zip",
        "model:\n  weights: https://u:p'w\"S3CR3T7@127.0.0.1:9/x.pth",
    ],
)
def test_a_wrong_config_file_is_refused_without_its_secrets(
    content: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("LIGHTSHIP_STORAGE_DEADLINE_S", "1")
    (tmp_path / "wrong.yaml").write_text(content)
    assert cli.main(["fit", "--config", f"{tmp_path}/wrong.yaml", f"--run.output={tmp_path}/r"])
    printed = capsys.readouterr()
    assert "lightship: " in printed.err
    assert planted.finds((printed.out + printed.err).encode()) == []
