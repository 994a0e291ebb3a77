"""One pod on podman, as a node's kubelet would run it; and what may be done to it."""

import copy
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.container.engine import podman

NETWORK = "lightship-test"


@dataclass
class Pod:
    """A pod with one container.

    Attributes:
        name: Of the pod; the container's is NAME-CONTAINER, as podman has it.
        spec: The pod's spec as the manifest has it.
        metadata: Labels and annotations.
        aliases: Names under which DNS knows it on the network.
        objects: ConfigMaps and Secrets of the namespace.
        is_evicted: Whether it was given the condition DisruptionTarget.
    """

    name: str
    spec: dict[str, Any]
    metadata: dict[str, Any]
    aliases: list[str]
    objects: list[dict[str, Any]]
    folder: Path
    is_evicted: bool = False
    _last_words: str | None = None

    @property
    def container(self) -> str:
        return f"{self.name}-{self.spec['containers'][0]['name']}"

    @property
    def grace_s(self) -> int:
        return int(self.spec.get("terminationGracePeriodSeconds", 30))

    def start(self) -> None:
        """`podman kube play`, on an address of its own."""
        path = self.folder / f"{self.name}.yaml"
        documents = [each for each in self.objects if each["kind"] == "ConfigMap"]
        # podman 4.3 mounts no Secret: one of its own name and content stands for it.
        documents += [
            {"apiVersion": "v1", "kind": "ConfigMap", "data": each["stringData"],
             "metadata": {"name": f"secret-{each['metadata']['name']}"}}
            for each in self.objects if each["kind"] == "Secret"
        ]  # fmt: skip
        documents = [renamed(each, self.name) for each in documents]
        path.write_text(yaml.safe_dump_all([*documents, self._played()]))
        network = f"{NETWORK}:" + ",".join(f"alias={alias}" for alias in self.aliases)
        podman("kube", "play", "--network", network, path.name, cwd=path.parent)

    def _played(self) -> dict[str, Any]:
        """The Pod for podman 4.3, which does less than a kubelet.

        Variables from elsewhere are put in here, and names that must be a pod's own get its name in
        front; probes are left to `probe`. All else stays as it is.
        """
        spec = copy.deepcopy(self.spec)
        for container in spec["containers"]:
            container["env"] = [
                {"name": name, "value": value} for name, value in self._variables(container)
            ]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                container.pop(probe, None)
            for mount in container["volumeMounts"]:
                mount["name"] = f"{self.name}-{mount['name']}"
        for volume in spec["volumes"]:
            volume["name"] = f"{self.name}-{volume['name']}"
            if "secret" in volume:
                secret = volume.pop("secret")
                volume["configMap"] = {"name": f"secret-{secret['secretName']}"}
            if "configMap" in volume:
                volume["configMap"]["name"] = f"{self.name}-{volume['configMap']['name']}"
        metadata = {**self.metadata, "name": self.name}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    def _variables(self, container: dict[str, Any]) -> list[tuple[str, str]]:
        found: dict[str, str] = {}
        for item in container.get("env", ()):
            value = item.get("value")
            if value is not None:
                value = re.sub(r"\$\((\w+)\)", lambda used: found.get(used[1], used[0]), value)
            elif "fieldRef" in item["valueFrom"]:
                path = item["valueFrom"]["fieldRef"]["fieldPath"]
                kind, key = re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path).groups()
                value = self.metadata[kind][key]
            else:
                wanted = item["valueFrom"]["secretKeyRef"]
                secrets = [
                    each["stringData"]
                    for each in self.objects
                    if each["kind"] == "Secret" and each["metadata"]["name"] == wanted["name"]
                ]
                value = next((s[wanted["key"]] for s in secrets if wanted["key"] in s), None)
                assert value is not None or wanted.get("optional"), wanted
            if value is not None:
                found[item["name"]] = value
        return list(found.items())

    def _state(self) -> dict[str, Any]:
        return json.loads(podman("container", "inspect", self.container))[0]["State"]

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        state = self._state()
        return state["ExitCode"] if state["Status"] in ("exited", "stopped") else None

    @property
    def said(self) -> str:
        if self._last_words is not None:
            return self._last_words
        done = subprocess.run(
            ["podman", "logs", self.container], capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr

    @property
    def address(self) -> str:
        infra = json.loads(podman("pod", "inspect", self.name))["InfraContainerID"]
        found = json.loads(podman("container", "inspect", infra))[0]["NetworkSettings"]
        return found["Networks"][NETWORK]["IPAddress"]

    def signal(self, name: str) -> None:
        """To process 1; KILL ends all processes of the pod, as the loss of a node does."""
        podman("kill", "--signal", name, self.container, check=False)  # it may just have ended

    @property
    def heartbeat_s(self) -> float:
        """When it last gave a sign of life, by the file's time."""
        variables = dict(self._variables(self.spec["containers"][0]))
        place = f"/proc/{self._state()['Pid']}/root{variables['LIGHTSHIP_HEARTBEAT_FILE']}"
        return os.stat(place).st_mtime

    def freeze(self) -> None:
        podman("pause", self.container)

    def thaw(self) -> None:
        podman("unpause", self.container)

    def cut(self) -> None:
        """Take it from the network."""
        infra = json.loads(podman("pod", "inspect", self.name))["InfraContainerID"]
        podman("network", "disconnect", "--force", NETWORK, infra)

    def probe(self, kind: str) -> bool:
        """Whether the container passes one of its probes."""
        command = self.spec["containers"][0][kind]["exec"]["command"]
        done = subprocess.run(
            ["podman", "exec", self.container, *command], capture_output=True, timeout=60
        )
        return done.returncode == 0

    def run_out_of_memory(self) -> None:
        """Fill its memory limit until the kernel has killed all that is in it.

        As it does at once where memory.oom.group is set, which Kubernetes does (cgroup v2).
        """
        pid = self._state()["Pid"]
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        [cgroup] = [line.split(":")[2] for line in lines if ":memory:" in line]
        members = Path(f"/sys/fs/cgroup/memory{cgroup}/cgroup.procs")
        for member in members.read_text().split():  # they go first
            Path(f"/proc/{member}/oom_score_adj").write_text("1000")
        eater = os.fork()
        if eater == 0:
            try:
                members.write_text(str(os.getpid()))
                eaten = []
                while True:
                    eaten.append(b"x" * 2**24)
            finally:
                os._exit(1)
        end = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(eater, signal.SIGKILL)
        os.waitpid(eater, 0)
        assert not Path(f"/proc/{pid}").exists(), "the kernel has killed nothing"

    def retire(self) -> None:
        """After its end: keep what it said, and take its address and names from the network."""
        self._last_words = self.said
        self.remove()

    def remove(self) -> None:
        subprocess.run(["podman", "unpause", self.container], capture_output=True, timeout=60)
        podman("pod", "rm", "--force", "--time", "0", self.name, check=False)


def renamed(config: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The ConfigMap under a name of the pod's own: podman makes a volume of that name."""
    name = f"{prefix}-{config['metadata']['name']}"
    return {**config, "metadata": {"name": name}}
