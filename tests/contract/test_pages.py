"""What README.md and docs/ say of flags, variables, bounds, codes and files is what there is."""

import dataclasses
import inspect
import re

import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from lightship import __version__
from lightship.cli import parser
from lightship.distributed import elastic_agent, rendezvous
from lightship.errors import EXIT_CODES
from lightship.storage.backend import PIECE_BYTES
from lightship.storage.retry import Limits
from lightship.tracking.metrics_csv import MetricsCSV
from lightship.tracking.start import start_tracking
from lightship.training.callbacks.checkpointing import Checkpointing
from tests.support import settings_page
from tests.support.manifests import of_kind
from tests.support.pages import PAGES, ROOT, examples_of

MOST_LINES = {
    "README.md": 199,
    "docs/measurements.md": 275,
    "docs/finetune.md": 170,
    "docs/kubernetes.md": 170,
    "docs/security.md": 135,
    "docs/settings.md": 999,
    "docs/storage.md": 130,
    "docs/your-own.md": 140,
}
"""Of the others: 120."""
MOST_PICTURE_BYTES = 300_000


def page(name: str) -> str:
    return (ROOT / name).read_text()


def rows_of(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def default_of(function: object, name: str) -> object:
    assert callable(function)
    return inspect.signature(function).parameters[name].default


def defaults() -> dict[str, object]:
    """Flag without its dashes -> default."""
    return {
        f"{section}.{field.name}": field.default
        for section, fields in parser.SECTIONS.items()
        for field in dataclasses.fields(fields)
    }


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_short(name: str) -> None:
    assert len(page(name).splitlines()) <= MOST_LINES.get(name, 120)


def test_every_page_is_in_the_table_of_contents() -> None:
    assert "](docs/index.md)" in page("README.md")
    linked = set(re.findall(r"^\| \[.*?\]\((.*?)\)", page("docs/index.md"), re.MULTILINE))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert linked == pages | {"../CONTRIBUTING.md", "../CHANGELOG.md"}


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name: str) -> None:
    """From the root, or from the package: `data/order.py`."""
    named = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.py|(?:\w+/)+[\w.-]+\.(?:yaml|lock))`", page(name))
    for path in named:
        assert any((ROOT / folder / path).exists() for folder in ("", "src/lightship")), path


def test_the_changelog_has_this_version() -> None:
    versions = re.findall(r"^## \[(.+)\]$", page("CHANGELOG.md"), re.MULTILINE)
    assert versions[:2] == ["Unreleased", __version__]


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page(name)):
        if "://" in target:
            continue
        place, _, heading = target.partition("#")
        path = (ROOT / name).parent / place
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert heading in [text.lower().replace(" ", "-") for text in headings], target
        if path.suffix == ".png":
            assert path.stat().st_size < MOST_PICTURE_BYTES, target


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_classes_that_are_named_exist(name: str) -> None:
    """`TwoWords` or `TwoWords.method`, of the package."""
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for owner, method in re.findall(r"`((?:[A-Z][a-z]+){2,})(?:\.(\w+))?`", page(name)):
        assert re.search(rf"^class {owner}\b", sources, re.MULTILINE), owner
        assert not method or f"def {method}(" in sources, method


@pytest.mark.parametrize("name", PAGES)
def test_flags_and_variables_exist(name: str) -> None:
    known = defaults()
    for flag in re.findall(rf"--((?:{'|'.join(parser.SECTIONS)})\.\w+)", page(name)):
        assert flag in known, f"--{flag}"
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for variable in re.findall(r"\bLIGHTSHIP_[A-Z0-9_]+", page(name)):
        assert variable in sources, variable


def test_the_settings_page_has_every_flag_and_variable() -> None:
    text = settings_page.text()
    sources = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    internal = {"LIGHTSHIP_AGENT_PID", "LIGHTSHIP_ARGUMENTS"}
    variables = {name for each in sources for name in re.findall(r"\bLIGHTSHIP_[A-Z0-9_]+", each)}
    assert {name for name in variables - internal if f"`{name}`" not in text} == set()
    flags = re.findall(r'"--([a-z_]+)"', inspect.getsource(parser))
    assert "ckpt_path" in flags
    assert {name for name in flags if f"`--{name}" not in text} == set()


def test_the_settings_page_is_generated() -> None:
    assert settings_page.PAGE.read_text() == settings_page.text(), "run `make docs`"


@pytest.mark.parametrize("name", PAGES)
def test_numbers_behind_flags_are_the_defaults(name: str) -> None:
    """`--data.prefetch_gib` (2) says that 2 is the default."""
    for flag, number in re.findall(r"`--(\w+\.\w+)` \(([\d.]+)\)", page(name)):
        assert float(number) == float(str(defaults()[flag])), flag


def test_the_exit_codes_are_the_contract() -> None:
    told = {cells[0] for cells in rows_of(page("README.md").partition("## Exit codes")[2])}
    assert told == {"code", "---", "other", *(str(row.code) for row in EXIT_CODES.values())}


def test_every_bound_is_as_told() -> None:
    rows = rows_of(page("docs/failures.md").partition("## Every bound")[2])[2:]
    bound_by = {cells[2]: cells[1] for cells in rows}
    checked = 0
    for told, value in bound_by.items():
        for flag in re.findall(r"--(\w+\.\w+)", told.partition(",")[0]):
            default, number = defaults()[flag], value.split()[0].replace(",", "")
            assert number == "none" if default is None else float(number) == default
            checked += 1
    assert checked == 9
    deadline_s, alive = Limits().total_s, DynamicRendezvousHandler.from_backend
    join_s = RendezvousTimeout().join.total_seconds()
    interval_s = default_of(alive, "keep_alive_interval")
    times = default_of(alive, "keep_alive_max_attempt")
    stop_s = elastic_agent.DEFAULTS["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    expected = {
        "`LIGHTSHIP_STORAGE_DEADLINE_S`": f"{deadline_s:g} s",
        "`LIGHTSHIP_STORAGE_DEADLINE_S` (twice it)": f"{2 * deadline_s:g} s and the transfer",
        "`join_timeout` in `PET_RDZV_CONF`": f"{join_s:g} s",
        "`keep_alive_interval`, `keep_alive_max_attempt` in `PET_RDZV_CONF`": f"{interval_s} s, "
        f"{times} times",
        "`TORCH_ELASTIC_SHUTDOWN_TIMEOUT`": f"{stop_s} s",
        "`PET_MAX_RESTARTS`": str(rendezvous.MAX_RESTARTS),
        "": f"{default_of(start_tracking, 'init_timeout_s'):g} s, "
        f"{default_of(start_tracking, 'finish_timeout_s'):g} s",
    }
    assert {told: bound_by[told] for told in expected} == expected


def test_what_is_saved_and_when_is_as_told() -> None:
    text = page("docs/failures.md")
    assert f"written every {default_of(MetricsCSV, 'write_every_s'):g} s" in text
    assert default_of(Checkpointing, "agree_every_steps") == 8
    assert "up to 8 steps" in text


def test_the_limits_of_storage_are_as_told() -> None:
    text, limits = page("docs/storage.md"), Limits()
    told = dict(cells for cells in rows_of(text.partition("## Retries and timeouts")[2]))
    assert told["a call fails after"].startswith(
        f"{limits.total_s:g} s without progress, or {limits.attempts} tries"
    )
    assert told["pause between tries"] == (
        f"random, up to {2 * limits.backoff_s:g} s, doubled each time, "
        f"at most {limits.backoff_cap_s:g} s"
    )
    assert told["connecting"] == f"{limits.connect_s:g} s a try"
    assert told["silence on an open connection"] == f"{limits.read_s:g} s a try"
    assert told["test of the output at the start"] == f"{limits.probe_s:g} s"
    assert f"n / {limits.slowest_bytes_per_s / 1024:g} KiB" in told["a transfer of n bytes"]
    part_mib = 2 * PIECE_BYTES // 2**20
    assert f"one PUT up to {2 * part_mib} MiB" in text
    assert f"parts of {part_mib} MiB" in text


def test_the_jobs_numbers_are_as_told() -> None:
    text = page("docs/kubernetes.md")
    [job], [spot] = of_kind("k8s/job.yaml", "Job"), of_kind("k8s/overlays/spot", "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    grace_s, spot_s = (
        each["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] for each in (job, spot)
    )
    assert f"its grace of {grace_s} s (spot: {spot_s} s)" in text
    assert f"has {spot_s} s of grace" in text
    assert job["spec"]["backoffLimitPerIndex"] == 6
    assert "six times an index" in text
    assert "-lt 1800" in container["livenessProbe"]["exec"]["command"][-1]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 3600
    assert "no step for half an hour, no first step within an hour" in text


@pytest.mark.parametrize(
    "words",
    [
        "access denied",
        "no success within ",
        "cannot connect to ",
        "fewer than ",
        " MiB free",
        "torch can use no GPU ",
        "does not see what node 0 wrote ",
    ],
)
def test_what_is_seen_is_what_is_said(words: str) -> None:
    assert words.strip() in page("docs/kubernetes.md")
    assert any(words in path.read_text() for path in (ROOT / "src").rglob("*.py"))


def test_every_overlay_is_told_of() -> None:
    text = page("docs/kubernetes.md")
    for path in (ROOT / "k8s/overlays").iterdir():
        assert f"{path.name}`" in text, path.name


def test_examples_are_cut_out_as_they_stand() -> None:
    text = (
        "Words.\n\n    make x\n    a \\\n      b\n\n    # no command\n\n"
        "```sh\n$ lightship fit\n```\n\n```python\n# own.py\nx = 1\n\n    # in it\n```\n- item\n"
    )
    told = [(each.line, each.kind, each.text, each.file) for each in examples_of("p", text)]
    assert told == [
        (3, "command", "make x", ""),
        (4, "command", "a b", ""),
        (10, "command", "lightship fit", ""),
        (14, "python", "# own.py\nx = 1\n\n    # in it\n", "own.py"),
    ]
