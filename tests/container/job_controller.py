"""Kubernetes' Job controller for one Indexed Job, as far as lightship's Job uses it.

After https://kubernetes.io/docs/concepts/workloads/controllers/job (Kubernetes 1.33): one pod an
index; a failed pod is held against podFailurePolicy, in the order of its rules, and is replaced
once it has ended, after 10 s x 2^(n-1) (at most 10 minutes), where n counts the index's failures,
those ignored too; more counted failures than backoffLimitPerIndex fail the index, and more failed
indexes than maxFailedIndexes the Job; FailJob does so at once; successPolicy ends it well.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.container.pods import Pod

_BACKOFF_S, _MOST_BACKOFF_S = 10.0, 600.0


class Job:
    """A Job and its pods.

    Args:
        objects: Everything in the namespace: the Job, ConfigMaps, Secrets.
        folder: For what podman is given.
        late_s: Index -> seconds until it finds a place to run, at its first start.
    """

    def __init__(
        self, objects: list[dict[str, Any]], folder: Path, late_s: dict[int, float] | None = None
    ) -> None:
        [self.manifest] = [each for each in objects if each["kind"] == "Job"]
        self.spec, self.objects, self.folder = self.manifest["spec"], objects, folder
        self.name, self.uid = self.manifest["metadata"]["name"], str(uuid.uuid4())
        self.active: dict[int, Pod] = {}
        self.ended: list[tuple[Pod, int, str]] = []
        self.counted: Counter[int] = Counter()
        self.ignored: Counter[int] = Counter()
        self.succeeded: set[int] = set()
        self.failed: set[int] = set()
        self.condition = ""
        self.starts = 0
        now = time.monotonic()
        self._not_before_s = {i: now + s for i, s in (late_s or {}).items()}

    def sync(self) -> None:
        """Do what is to be done now."""
        if self.condition:
            return
        for index, pod in list(self.active.items()):
            code = pod.exit_code
            if code is not None:
                del self.active[index]
                pod.retire()
                self._take_end(index, pod, code)
        self._decide()
        if self.condition:
            for pod in list(self.active.values()):
                self._terminate(pod)
            return
        if self.spec.get("suspend"):
            return
        for index in range(self.spec["completions"]):
            settled = self.active.keys() | self.succeeded | self.failed
            if index not in settled and time.monotonic() >= self._not_before_s.get(index, 0):
                self._start(index)

    def until(self, condition: Callable[[], Any], what: str, bound_s: float = 180.0) -> Any:
        """The first true value of `condition`; fails after `bound_s`, or when the Job has ended."""
        end = time.monotonic() + bound_s
        while not (value := condition()):
            assert time.monotonic() < end, f"waited {bound_s} s for {what}\n{self.story()}"
            is_over = bool(self.condition)
            self.sync()
            assert not is_over or condition(), f"the Job ended before {what}\n{self.story()}"
            time.sleep(0.2)
        return value

    def finish(self, bound_s: float = 240.0) -> str:
        """The Job's condition in the end, such as Complete or Failed: reason."""
        return self.until(lambda: self.condition, "the Job's end", bound_s)

    def evict(self, index: int) -> None:
        """As a drain does: the condition DisruptionTarget, SIGTERM, and SIGKILL after the grace."""
        pod = self.active[index]
        pod.is_evicted = True
        pod.signal("TERM")
        end = time.monotonic() + pod.grace_s
        while pod.exit_code is None and time.monotonic() < end:
            time.sleep(0.2)
        if pod.exit_code is None:
            pod.signal("KILL")

    def story(self) -> str:
        """What happened, and what the pods said."""
        lines = [
            f"pod {pod.name} ended with {code}: {action}\n{pod.said[-3000:]}"
            for pod, code, action in self.ended
        ]
        lines += [f"pod {pod.name} runs\n{pod.said[-3000:]}" for pod in self.active.values()]
        return "\n".join([*lines, f"condition: {self.condition or 'none yet'}"])

    def codes(self) -> list[tuple[int, int, str]]:
        """(index, exit code, action) of every pod that ended, in order."""
        key = "batch.kubernetes.io/job-completion-index"
        return [(int(pod.metadata["labels"][key]), code, a) for pod, code, a in self.ended]

    def remove(self) -> None:
        for pod in [*self.active.values(), *(pod for pod, _, _ in self.ended)]:
            pod.remove()

    def _start(self, index: int) -> None:
        key = "batch.kubernetes.io/job-completion-index"
        template = self.spec["template"]
        labels = {
            **template["metadata"].get("labels", {}),
            "batch.kubernetes.io/job-name": self.name,
            "batch.kubernetes.io/controller-uid": self.uid,
            key: str(index),
        }
        host = f"{self.name}-{index}"
        spec = {**template["spec"], "hostname": host}
        names = [host, f"{host}.{spec['subdomain']}"]
        metadata = {"labels": labels, "annotations": {key: str(index)}}
        self.starts += 1
        pod = Pod(f"{host}-{self.starts}", spec, metadata, names, self.objects, self.folder)
        self.active[index] = pod
        pod.start()

    def _take_end(self, index: int, pod: Pod, code: int) -> None:
        if code == 0:
            self.succeeded.add(index)
            self.ended.append((pod, code, "Succeeded"))
            return
        action = self._action(pod, code)
        self.ended.append((pod, code, action))
        if action == "FailJob":
            self.condition = f"Failed: PodFailurePolicy, {pod.name} ended with {code}"
        elif action == "Ignore":
            self.ignored[index] += 1
        else:
            self.counted[index] += 1
            if self.counted[index] > self.spec["backoffLimitPerIndex"]:
                self.failed.add(index)
        failures = self.counted[index] + self.ignored[index]
        backoff_s = min(_BACKOFF_S * 2 ** (failures - 1), _MOST_BACKOFF_S)
        self._not_before_s[index] = time.monotonic() + backoff_s

    def _action(self, pod: Pod, code: int) -> str:
        for rule in self.spec["podFailurePolicy"]["rules"]:
            if "onExitCodes" in rule:
                asked = rule["onExitCodes"]
                if (code in asked["values"]) == (asked["operator"] == "In"):
                    return rule["action"]
            elif pod.is_evicted and any(
                pattern["type"] == "DisruptionTarget" for pattern in rule["onPodConditions"]
            ):
                return rule["action"]
        return "Count"

    def _decide(self) -> None:
        if self.condition:
            return
        if len(self.failed) > self.spec["maxFailedIndexes"]:
            self.condition = f"Failed: MaxFailedIndexesExceeded, {sorted(self.failed)}"
        rules = self.spec["successPolicy"]["rules"]
        if any(int(rule["succeededIndexes"]) in self.succeeded for rule in rules):
            self.condition = "Complete"

    def _terminate(self, pod: Pod) -> None:
        """End what a decided Job still runs. (Its end is noted, and changes nothing.)"""
        if pod.exit_code is None:
            pod.signal("TERM")
        end = time.monotonic() + pod.grace_s
        while (code := pod.exit_code) is None:
            if time.monotonic() > end:
                pod.signal("KILL")
            time.sleep(0.2)
        [index] = [i for i, each in self.active.items() if each is pod]
        del self.active[index]
        pod.retire()
        self.ended.append((pod, code, "Terminated"))
