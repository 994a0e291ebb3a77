"""The manifests against Kubernetes' schemas, its security standard and lightship's contract."""

import copy
import ipaddress
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import ValidationError, validate
from kubernetes_validate.utils import all_versions

from lightship import cli
from lightship.commands.base import Command
from lightship.config import TrainerConfig
from lightship.distributed.liveness import MAX_SILENCE_S, MAX_START_S
from lightship.errors import EXIT_CODES
from tests.support.manifests import ALONE, OVERLAYS, ROOT, environment, of_kind, pod_specs, rendered
from tests.support.pod_security import violations

ALL = [*ALONE, *OVERLAYS]
TRAINING = [name for name in ALL if not name.endswith(("local-s3", "metadata"))]
VERSIONS = [v for v in all_versions() if int(v.split(".")[1]) >= 33]


def training(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training Job's spec, and its container."""
    jobs = [job for each in rendered(name) for job in jobs_of(each) if job["kind"] == "Job"]
    [job] = jobs
    [container] = job["spec"]["template"]["spec"]["containers"]
    return job["spec"], container


def is_on_gpus(name: str) -> bool:
    """By torchrun's variables; a TPU's hosts are told by GKE."""
    return "tpu" not in name


def jobs_of(each: dict[str, Any]) -> list[dict[str, Any]]:
    """The object; of a JobSet, for which there is no schema here, the Jobs that it makes."""
    if each["kind"] != "JobSet":
        return [each]
    parts = each["spec"]["replicatedJobs"]
    return [{"apiVersion": "batch/v1", "kind": "Job", **part["template"]} for part in parts]


def test_what_is_promised_is_there() -> None:
    assert {"k8s/job.yaml", "k8s/tpu.yaml"} <= set(ALONE)
    overlays = {Path(name).name for name in OVERLAYS}
    assert overlays >= {
        "single-gpu",
        "spot",
        "kueue",
        "local-s3",
        "cpu",
        "tpu-multihost",
        "tpu-multislice",
    }
    assert len(VERSIONS) >= 5, VERSIONS


@pytest.mark.parametrize("name", ALL)
def test_valid_in_every_version(name: str) -> None:
    for version in VERSIONS:
        for each in rendered(name):
            for part in jobs_of(each):
                validate(part, version, strict=True)


def test_the_schemas_would_refuse_a_wrong_field() -> None:
    [job] = copy.deepcopy(of_kind("k8s/job.yaml", "Job"))
    job["spec"]["backoffLimitPerIndexes"] = 1
    with pytest.raises(ValidationError):
        validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("metadata")])
def test_pod_security_restricted(name: str) -> None:
    assert pod_specs(name)
    for spec in pod_specs(name):
        assert violations(spec) == []
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsUser"] > 0  # a name could not be verified
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert {"requests", "limits"} <= container["resources"].keys()
        for volume in spec["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], volume


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hostNetwork", True),
        ("hostPID", True),
        ("volumes.0", {"name": "host", "hostPath": {"path": "/"}}),
        ("securityContext.runAsNonRoot", False),
        ("securityContext.runAsUser", 0),
        ("securityContext.seccompProfile", {"type": "Unconfined"}),
        ("securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
        ("containers.0.securityContext.privileged", True),
        ("containers.0.securityContext.allowPrivilegeEscalation", True),
        ("containers.0.securityContext.capabilities", {}),
        ("containers.0.securityContext.capabilities.add", ["SYS_ADMIN"]),
        ("containers.0.securityContext.procMount", "Unmasked"),
        ("containers.0.securityContext.seLinuxOptions", {"type": "spc_t"}),
        ("containers.0.ports", [{"containerPort": 1, "hostPort": 1}]),
    ],
)
def test_the_checker_finds_what_is_not_restricted(path: str, value: Any) -> None:
    spec = copy.deepcopy(pod_specs("k8s/job.yaml")[0])
    *parents, last = path.split(".")
    place: Any = spec
    for part in parents:
        place = place[int(part)] if part.isdecimal() else place[part]
    place[int(last) if last.isdecimal() else last] = value
    assert violations(spec)


@pytest.mark.parametrize("name", TRAINING)
def test_the_jobs_reactions_are_those_of_the_exit_codes(name: str) -> None:
    spec, container = training(name)
    reactions = {"fail at once": "FailJob", "retry, not counted": "Ignore"}
    expected: dict[str, set[int]] = {action: set() for action in reactions.values()}
    for row in EXIT_CODES.values():
        if row.reaction in reactions:
            expected[reactions[row.reaction]].add(row.code)
    found: dict[str, set[int]] = {action: set() for action in reactions.values()}
    rules = spec["podFailurePolicy"]["rules"]
    for rule in rules:
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert codes["operator"] == "In"
            assert codes["containerName"] == container["name"]
            assert codes["values"] == sorted(set(codes["values"]))  # the API server asks for it
            found[rule["action"]] |= set(codes["values"])
    assert found == expected
    # An evicted pod that was killed in the end is not counted; one with a wrong flag still fails.
    order = [(rule["action"], "onPodConditions" in rule) for rule in rules]
    assert order.index(("FailJob", False)) < order.index(("Ignore", True))


@pytest.mark.parametrize("name", TRAINING)
def test_what_the_api_server_asks_of_a_job(name: str) -> None:
    """Rules that no schema holds."""
    spec, container = training(name)
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    assert "backoffLimit" not in spec
    assert spec["backoffLimitPerIndex"] > 0
    assert 0 <= spec["maxFailedIndexes"] <= spec["completions"]
    assert spec["successPolicy"]["rules"] == [{"succeededIndexes": "0"}]
    for resource, amount in container["resources"]["requests"].items():
        if "/" in resource:  # extended resources cannot be overcommitted
            assert container["resources"]["limits"][resource] == amount


@pytest.mark.parametrize("name", [n for n in TRAINING if is_on_gpus(n)])
def test_the_parts_of_a_job_agree(name: str) -> None:
    spec, container = training(name)
    pod, variables = spec["template"]["spec"], environment(container)
    assert spec["completions"] == spec["parallelism"] == int(str(variables["PET_NNODES"]))
    [job], [service] = of_kind(name, "Job"), of_kind(name, "Service")
    title = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": title}
    assert variables["PET_MASTER_ADDR"] == f"{title}-0.{pod['subdomain']}"
    assert variables["PET_LOCAL_ADDR"] == f"{title}-$(PET_NODE_RANK).{pod['subdomain']}"
    assert str(service["spec"]["ports"][0]["port"]) == variables["PET_MASTER_PORT"]
    has_peers = spec["completions"] > 1
    assert ("LIGHTSHIP_RENDEZVOUS_SECRET" in variables) == has_peers
    names = list(variables)
    for index, value in enumerate(variables.values()):  # a reference looks back only
        for used in re.findall(r"\$\((\w+)\)", value or ""):
            assert used in names[:index], used
    grace_s = pod["terminationGracePeriodSeconds"]
    assert 5 <= grace_s - int(str(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])) <= 10
    heartbeat = variables["LIGHTSHIP_HEARTBEAT_FILE"]
    for probe in ("startupProbe", "livenessProbe"):
        assert heartbeat in " ".join(container[probe]["exec"]["command"])
    startup = container["startupProbe"]
    start_s = startup["periodSeconds"] * startup["failureThreshold"]
    silence = re.search(r"-lt (\d+)", container["livenessProbe"]["exec"]["command"][-1])
    assert (int(silence[1]), start_s) == (MAX_SILENCE_S, MAX_START_S)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("metadata")])
def test_every_pod_has_a_policy(name: str) -> None:
    """For what comes in and what goes out: nothing by default reaches the metadata address."""
    policies = of_kind(name, "NetworkPolicy")
    for labels in pod_labels(name):
        applied = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], labels)]
        assert {kind for spec in applied for kind in spec["policyTypes"]} == {"Ingress", "Egress"}
        for spec in applied:
            for rule in spec.get("egress", ()):
                assert "ipBlock" not in str(rule)
                open_ports = {port["port"] for port in rule.get("ports", ())}
                assert "to" in rule or open_ports <= {53, 443}


def test_the_metadata_overlay_opens_that_address_for_every_training_pod() -> None:
    [policy] = of_kind("k8s/overlays/metadata", "NetworkPolicy")
    for name in TRAINING:
        for labels in pod_labels(name):
            assert selects(policy["spec"]["podSelector"], labels), name
    [rule] = policy["spec"]["egress"]
    blocks = [ipaddress.ip_network(to["ipBlock"]["cidr"]) for to in rule["to"]]
    assert all(block.is_link_local and block.num_addresses <= 4 for block in blocks)


@pytest.mark.parametrize("name", ALL)
def test_secrets_are_files(name: str) -> None:
    """Optional ones in training, and none in the environment, which every child would inherit."""
    for spec in pod_specs(name):
        if spec["containers"][0]["name"] == "s3":
            continue  # SeaweedFS takes its keys from the environment only
        for container in spec["containers"]:
            assert not [i for i in container["env"] if "secretKeyRef" in i.get("valueFrom", {})]
            mounted = {mount["name"]: mount for mount in container["volumeMounts"]}
            paths = [
                value
                for variable, value in environment(container).items()
                if variable.endswith(("_FILE", "_CREDENTIALS_FILE")) and "HEARTBEAT" not in variable
            ]
            for path in paths:
                assert str(path).startswith(mounted["secrets"]["mountPath"] + "/")
        [volume] = [volume["secret"] for volume in spec["volumes"] if volume["name"] == "secrets"]
        assert volume["defaultMode"] == 0o440
        assert volume["secretName"] == "lightship"


def pod_labels(name: str) -> list[dict[str, str]]:
    """The labels of every pod, with those that the controllers add."""
    found = []
    for each in rendered(name):
        jobs = jobs_of(each)
        for job in jobs if "template" in jobs[0].get("spec", {}) else ():
            added = {"batch.kubernetes.io/job-name": job.get("metadata", {}).get("name", "")}
            if each["kind"] == "JobSet":
                added = {"jobset.sigs.k8s.io/jobset-name": each["metadata"]["name"]}
            found.append(added | job["spec"]["template"]["metadata"]["labels"])
        if each["kind"] == "Pod":
            found.append(each["metadata"]["labels"])
    return found


@pytest.mark.parametrize("name", TRAINING)
def test_the_command_is_one_that_lightship_takes(name: str, tmp_path: Path) -> None:
    _, container = training(name)
    [config] = of_kind(name, "ConfigMap")
    path = tmp_path / "config.yaml"
    path.write_text(config["data"]["config.yaml"])
    arguments = [str(path) if part.startswith("/etc/") else part for part in container["args"]]
    command = cli.parse(arguments)
    assert command is not None
    assert command.name == "fit"
    assert str(command.config.run.output).startswith(("s3://", "gs://"))
    nodes, gpus = training(name)[0]["completions"], container["resources"]["limits"]
    devices = {"nvidia.com/gpu": "gpu", "google.com/tpu": "tpu"}
    asked = next((devices[name] for name in devices if name in gpus), "cpu")
    assert command.config.trainer.accelerator == asked  # with auto, a broken driver is not noticed
    ranks = nodes * int(gpus.get("nvidia.com/gpu", gpus.get("google.com/tpu", 1)))
    assert command.config.data.global_batch_size % ranks == 0


def test_the_fine_tuning_of_the_page_leaves_the_choice_to_the_recipe(tmp_path: Path) -> None:
    page = (ROOT / "docs/kubernetes.md").read_text().partition("## Fine-tune")[2]
    shown = yaml.safe_load(page.partition("```text\n")[2].partition("```")[0])
    path = tmp_path / "config.yaml"
    path.write_text(shown["config.yaml"])
    command = cli.parse([str(path) if part.startswith("/") else part for part in shown["args"]])
    assert isinstance(command, Command)
    assert command.config.run.output == "s3://bucket/runs/tuned"
    assert command.config.trainer.accelerator == "gpu"
    sizes = {
        row.settings.get("data.global_batch_size", 32) for row in command.choices.by_train_images
    }
    assert sizes == {16, 32, 64}
    assert "(16, 32 or 64)" in page


@pytest.mark.parametrize("name", [n for n in TRAINING if not is_on_gpus(n)])
def test_the_parts_of_a_tpu_job_agree(name: str) -> None:
    spec, container = training(name)
    pod, variables = spec["template"]["spec"], environment(container)
    assert variables["PJRT_DEVICE"] == "TPU"
    assert spec["completions"] == spec["parallelism"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(side) for side in topology.split("x"))
    assert chips == spec["completions"] * int(container["resources"]["limits"]["google.com/tpu"])
    assert {port["containerPort"] for port in container["ports"]} == {8471, 8431}
    services = of_kind(name, "Service")
    assert bool(services) == ("subdomain" in pod), "a JobSet makes both itself"
    for service in services:
        assert service["metadata"]["name"] == pod["subdomain"]
        assert service["spec"]["clusterIP"] == "None"
        [job] = of_kind(name, "Job")
        assert service["spec"]["selector"] == {
            "batch.kubernetes.io/job-name": job["metadata"]["name"]
        }


def test_spot_loses_less() -> None:
    lost_s = {}
    for name in ("k8s/job.yaml", "k8s/overlays/spot"):
        arguments = training(name)[1]["args"]
        [config] = of_kind(name, "ConfigMap")
        every = re.search(r"checkpoint_every_s: (\d+)", config["data"]["config.yaml"])
        assert every
        flagged = re.findall(r"--run.checkpoint_every_s=(\d+)", " ".join(arguments))
        lost_s[name] = int(flagged[-1] if flagged else every.group(1))
    assert lost_s["k8s/overlays/spot"] < lost_s["k8s/job.yaml"]


def test_spot_keeps_what_is_changed_in_the_base(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s", symlinks=True)
    base = tmp_path / "k8s/base/job.yaml"
    text = base.read_text()
    changes = {
        "args: [fit, --config,": "args: [fit, --config, finetune, --config,",
        "      tolerations:\n": "      tolerations:\n        - {key: own, operator: Exists}\n",
    }
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    base.write_text(text)
    pods = [pod_specs(str(tmp_path / name))[0] for name in ("k8s/job.yaml", "k8s/overlays/spot")]
    (args, spot_args), (tolerations, spot_tolerations) = zip(
        *((pod["containers"][0]["args"], pod["tolerations"]) for pod in pods), strict=True
    )
    assert spot_args[: len(args)] == args
    assert "finetune" in spot_args
    assert spot_tolerations[: len(tolerations)] == tolerations
    assert len(spot_tolerations) > len(tolerations)


def test_peers_wait_for_a_new_node_but_not_until_the_probe_ends_them() -> None:
    """Probe and waits begin at the last step: a peer is missed, then the rendezvous waits."""
    spec, container = training("k8s/job.yaml")
    conf = dict(pair.split("=") for pair in str(environment(container)["PET_RDZV_CONF"]).split(","))
    silence = re.search(r"-lt (\d+)", container["livenessProbe"]["exec"]["command"][-1])
    assert silence
    leave_s = {
        each["tolerationSeconds"]
        for each in spec["template"]["spec"]["tolerations"]
        if each["key"].startswith("node.kubernetes.io/") and each["effect"] == "NoExecute"
    }
    assert max(leave_s) + 600 < int(conf["join_timeout"])
    noticed_s, read_timeout_s = TrainerConfig().timeout_s, 60
    assert noticed_s + int(conf["join_timeout"]) + 2 * read_timeout_s < int(silence[1])


def test_kueue_holds_the_job() -> None:
    [job] = of_kind("k8s/overlays/kueue", "Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["spec"]["suspend"] is True


def test_everything_the_image_writes_is_mounted() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    volumes = re.search(r"^VOLUME \[(.*)\]$", text, re.MULTILINE)
    assert volumes
    places = {place.strip(' "') for place in volumes.group(1).split(",")}
    paths = re.findall(r"\b(?:\w*(?:HOME|CACHE|DIR)\w*)=(/\S+)", text)
    assert len(paths) >= 9
    for path in paths:
        assert any(path == place or path.startswith(place + "/") for place in places), path
    for name in TRAINING:
        spec, container = training(name)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        emptied = {v["name"] for v in spec["template"]["spec"]["volumes"] if "emptyDir" in v}
        for place in (*places, "/dev/shm"):
            assert mounts[place] in emptied, place
