"""The report: self-contained, safe with hostile names, and its charts show the numbers."""

import base64
import io
import json
import re
import subprocess
from html.parser import HTMLParser
from importlib import metadata

import numpy as np
import pytest
from PIL import Image

from lightship import __version__, storage
from lightship.report import Calibration, Confused, ReportData, Shown, write_report
from lightship.report.charts import ticks
from lightship.report.environment import environment_facts, git_commit
from lightship.safe_text import printable

HOSTILE = ["<script>alert(1)</script>", '" onload="alert(2)', "$\\frac{", "a\nb", "犬" * 40]


class Page(HTMLParser):
    """Tags, every address that a browser would follow, and the text."""

    void = frozenset(("meta", "img", "br", "line", "polyline", "circle", "link"))

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def values(self, *names):
        return [value for name, value in self.attributes if name in names]


def report_data(names, **changes):
    rng = np.random.default_rng(0)
    count = len(names)
    confusion = np.diag(rng.integers(20, 40, count)) + rng.integers(0, 3, (count, count))
    confusion[0, 1] = 19
    rows = [{"step": 10 * i, "epoch": 0, "train/loss": 2 / i, "train/acc": 1 - 1 / i, "lr": 0.1,
             "throughput/images_per_s": 1000.0 + i} for i in range(1, 40)]  # fmt: skip
    rows[-1] |= {"val/loss": float("nan"), "val/acc": 0.9}
    images = rng.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    values = {
        "title": "a <b>run</b>",
        "config": {"run": {"output": "s3://bucket/<i>x</i>"}, "data": {"root": None}},
        "rows": rows,
        "final": {"test/acc": 0.98765, "test/loss": float("inf"), "test/num_samples": 1234},
        "class_names": names,
        "confusion": confusion,
        "predictions": [
            Shown(image, names[0], names[i % 2], 0.5 + i / 20) for i, image in enumerate(images)
        ],
        "hardest": [Shown(images[1], names[0], names[1], 0.9, 7.25, "<i>file</i>.png")],
        "confused": [
            Confused(names[0], names[1], 19, [Shown(images[2], names[0], names[1], 0.8, 1.5)])
        ],
        "calibration": Calibration([10, 0, 30], [0.2, 0.0, 0.9], [0.4, 0.0, 0.8]),
        "starts": [
            {
                "began": "2026-01-02T03:04:05+00:00",
                "step": step,
                "processes": 2,
                "trained_s": 1.0,
                "steps_again": step // 10,
                "lost_s": 61.4,
            }
            for step in (0, 70)
        ],
        "environment": environment_facts(),
        "skipped": ["s3://bucket/<u>bad</u>.png: truncated"],
    }
    return ReportData(**{**values, **changes})


def write(tmp_path, data):
    url = write_report(str(tmp_path), data)
    html = storage.read_bytes(url).decode()
    return Page(html), html, tmp_path / "report"


def test_the_page_needs_nothing_else_and_escapes_every_name(tmp_path):
    page, html, _ = write(tmp_path, report_data(HOSTILE))
    assert page.open == []
    assert not {"script", "link", "iframe", "u"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    addresses = page.values("src", "href", "srcset", "xlink:href")
    assert len(addresses) == 8  # six predictions, the hardest, one of a confused pair
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "@import" not in html
    assert "url(" not in html
    assert "http" not in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    for name in (*HOSTILE, "a <b>run</b>", "s3://bucket/<i>x</i>", "s3://bucket/<u>bad</u>.png"):
        assert printable(name) in page.text
    assert "98.77%" in page.text
    assert "1,234" in page.text
    picture = Image.open(io.BytesIO(base64.b64decode(addresses[0].partition(",")[2])))
    assert picture.size == (12, 12)


def test_curves_and_worst_pairs_are_in_the_page(tmp_path):
    page, _, _ = write(tmp_path, report_data(HOSTILE))
    assert len(page.values("points")) == 5  # loss, accuracy (both splits), rate, images a second
    worst = page.text.partition("Most confused")[2]
    assert worst.index(HOSTILE[0]) < worst.index(HOSTILE[1]) < worst.index("19")


@pytest.mark.parametrize(
    ("final", "headline"),
    [
        ({"steps": 470.0, "val/acc": 0.9123, "test/acc": 0.8765}, "87.65%"),
        ({"steps": 470.0, "best_step": 400.0, "val/loss": 0.1, "val/acc": 0.9123}, "91.23%"),
        ({"steps": 470.0}, "470"),
    ],
)
def test_the_headline_is_the_accuracy(tmp_path, final, headline):
    _, html, _ = write(tmp_path, report_data(["a", "b"], final=final))
    assert re.search(r'<div class="big">(.*?)</div>', html)[1] == headline


def test_a_rare_mistake_is_seen(tmp_path):
    confusion = np.array([[9_996, 4, 0], [0, 10, 0], [0, 0, 10]])
    _, html, _ = write(tmp_path, report_data(["a", "b", "c"], confusion=confusion))
    cells = re.findall(r'<td style="--v:[^"]*" class="([^"]*)">(\d+)</td>', html)
    assert [count for _, count in cells] == [str(count) for count in confusion.flat]
    assert [count == "0" for _, count in cells] == ["none" in kinds for kinds, _ in cells]


def test_more_classes_than_a_confusion_matrix_has_are_listed(tmp_path):
    names = [f"class {i}" for i in range(3000)]
    accuracies, support = [0.5] * 3000, [10] * 3000
    accuracies[7], accuracies[8], support[8] = 0.25, float("nan"), 0
    data = report_data(names, confusion=None, class_acc=accuracies, class_support=support)
    page, _, folder = write(tmp_path, data)
    listed = page.text.partition("Accuracy by class")[2]
    assert listed.index("class 7") < listed.index("25.0%") < listed.index("class 0")
    per_class = json.loads((folder / "report.json").read_text())["per_class"]
    assert len(per_class) == 2999


def test_many_classes_have_a_picture_of_the_confusion_matrix(tmp_path):
    data = report_data([f"class {i}" for i in range(40)])
    page, html, _ = write(tmp_path, data)
    assert 'class="heat"' not in html
    (place,) = [i for i, (_, value) in enumerate(page.attributes) if value == "heat-map tiny"]
    uri = page.attributes[place + 1][1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    shares = data.confusion / data.confusion.sum(1, keepdims=True)
    np.testing.assert_array_equal(pixels[..., 3], (255 * np.sqrt(shares)).astype(np.uint8))
    of_wrong, of_right = pixels[~np.eye(40, dtype=bool)], pixels[np.eye(40, dtype=bool)]
    assert len(np.unique(of_wrong[:, :3], axis=0)) == len(np.unique(of_right[:, :3], axis=0)) == 1
    assert (of_wrong[0, :3] != of_right[0, :3]).all()


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0.0, 1.0, False, [0, 0.25, 0.5, 0.75, 1]),
        (0.97, 0.9934, False, [0.97, 0.98, 0.99, 1]),
        (-3.0, 5.0, False, [-4, -2, 0, 2, 4, 6]),
        (0.0, 1e-5, False, [0, 0.25e-5, 0.5e-5, 0.75e-5, 1e-5]),
        (0.0, 0.0, False, [0, 0.25]),  # one value
        (0.7, 0.7, False, [0.6, 0.8]),
        (1.0, 1 + 1e-15, False, [1, 1.25]),  # no interval of so few digits
        (0.0, 1.0, True, [0, 1]),
        (0.0, 10.0, True, [0, 5, 10]),
        (0.0, 123456.0, True, [0, 50000, 100000, 150000]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(low, high, whole, expected):
    assert ticks(low, high, 4, whole) == pytest.approx(expected)


def test_the_numbers_are_plain_json(tmp_path):
    data = report_data(HOSTILE)
    _, _, folder = write(tmp_path, data)
    text = (folder / "report.json").read_text()
    numbers = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert numbers["test/acc"] == 0.98765
    assert numbers["test/num_samples"] == 1234
    assert numbers["test/loss"] is None
    assert numbers["confusion"] == data.confusion.tolist()
    assert numbers["class_names"] == HOSTILE
    assert numbers["confused_pairs"][0] == [HOSTILE[0], HOSTILE[1], 19]
    first = numbers["per_class"][0]
    assert first["num_samples"] == data.confusion[0].sum()
    assert first["acc"] == pytest.approx(data.confusion[0, 0] / data.confusion[0].sum())
    assert numbers["environment"]["torch"]
    assert numbers["calibration"]["error"] == pytest.approx((10 * 0.2 + 30 * 0.1) / 40)
    assert numbers["hardest"] == [
        {"true": HOSTILE[0], "guess": HOSTILE[1], "probability": 0.9, "loss": 7.25,
         "path": "<i>file</i>.png"}
    ]  # fmt: skip
    assert numbers["starts"][1]["steps_again"] == 7
    assert numbers["config"]["data"]["root"] is None


def test_restarts_and_calibration_are_shown(tmp_path):
    page, html, _ = write(tmp_path, report_data(HOSTILE))
    assert "1 restart" in page.text
    assert "2026-01-02 03:04:05" in page.text
    assert "61 s" in page.text
    assert "12.5%" in page.text.partition("Calibration")[2].partition("\n")[0]
    assert html.count('<rect class="bar"') == 2  # an empty bin has no bar
    alone = report_data(HOSTILE)
    alone.starts = alone.starts[:1]
    page, _, _ = write(tmp_path / "alone", alone)
    assert "restart" not in page.text


def test_what_is_empty_is_left_out(tmp_path):
    page, _, folder = write(tmp_path, ReportData("only a title"))
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert "Confusion" not in page.text
    assert "svg" not in page.tags
    assert page.open == []


def test_one_point_and_one_class_are_drawn(tmp_path):
    rows = [{"step": 0, "train/loss": 0.0}]
    data = ReportData("little", rows=rows, class_names=["one"], confusion=np.array([[3]]))
    page, _, _ = write(tmp_path, data)
    assert page.values("points") == ["52.0,192.0"]
    assert "100.0%" in page.text
    assert not [value for value in page.values("points") if "nan" in value]


def test_git_commit_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "init", "-q"], check=True)
    assert git_commit() is None
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    expected = subprocess.run(["git", "log", "-1", "--format=%H"], capture_output=True, text=True)
    assert git_commit() == expected.stdout.strip()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch) -> None:
    version = metadata.version

    def of_others(package: str) -> str:
        if package == "lightship":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", of_others)
    assert environment_facts()["lightship"] == __version__
