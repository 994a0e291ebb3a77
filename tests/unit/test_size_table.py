"""Settings by the number of training images."""

from pathlib import Path

import pytest

from lightship import cli, config, size_table
from lightship.cli import parser
from lightship.errors import UsageError

ROWS = [
    {"up_to": 500, "trainer": {"max_epochs": 20}, "data": {"global_batch_size": 16}},
    {"up_to": 4000, "trainer": {"max_epochs": 8}},
    {"trainer": {"max_epochs": 4}},
]


def test_the_first_row_that_holds_the_set_is_chosen() -> None:
    table = size_table.read(ROWS, "x")
    found = [size_table.choose(table, n).get("trainer.max_epochs") for n in (1, 500, 501, 4000)]
    assert found == [20, 20, 8, 8]
    assert size_table.choose(table, 10**9) == {"trainer.max_epochs": 4}
    assert size_table.choose((), 5) == {}
    assert size_table.setting_names(table) == ["data.global_batch_size", "trainer.max_epochs"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        {},
        3,
        [{"up_to": 5}],
        [{"up_to": 9}, {"up_to": 5}, {}],
        [{"up_to": "x"}, {}],
        [{}, {}],
        [3],
    ],
)
def test_what_is_no_table_is_refused(rows: object) -> None:
    with pytest.raises(UsageError, match="x: by_train_images must be rows with rising up_to"):
        size_table.read(rows, "x")


FILE = """
optim: {lr: 0.5}
by_train_images:
- up_to: 100
  trainer: {max_epochs: 7}
  data: {flip: true}
- trainer: {max_epochs: 3}
"""


def test_flags_and_later_files_win_over_the_table(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(FILE)
    two.write_text("data: {flip: false}")

    def chosen(*flags: str) -> dict[str, object]:
        command = cli.parse(["fit", f"--config={one}", *flags])
        return dict(size_table.choose(command.by_train_images, 50))

    assert chosen() == {"trainer.max_epochs": 7, "data.flip": True}
    assert chosen(f"--config={two}") == {"trainer.max_epochs": 7}
    assert chosen("--trainer.max_epochs=2") == {"data.flip": True}
    assert chosen('--trainer={"max_epochs": 2}', "--data.flip=true") == {}


@pytest.mark.parametrize(
    ("was", "now", "code", "line"),
    [
        ("max_epochs: 3", "max_epoch: 3", 2, "unknown key trainer.max_epoch"),
        ("max_epochs: 3", "max_epochs: 0", 78, "--trainer.max_epochs is 0, which trains nothing"),
        ("max_epochs: 3", "max_epochs: many", 2, "--trainer.max_epochs is 'many'"),
    ],
)
def test_rows_are_checked_before_anything_is_read(
    was: str, now: str, code: int, line: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(FILE.replace(was, now))
    assert cli.main(["fit", f"--config={path}", "--data.root=/nowhere"]) == code
    assert line in capsys.readouterr().err


def test_values_have_the_types_of_their_settings(tmp_path: Path) -> None:
    """PyYAML reads 1e-3 as text, and quotes make text of anything."""
    path = tmp_path / "one.yaml"
    path.write_text(
        "by_train_images:\n- optim: {lr: 1e-3, layer_decay: 1}\n"
        '  data: {flip: "false", global_batch_size: "32", sizes_px: [8, "12"], image_size_px: 12}\n'
    )
    (row,) = cli.parse(["fit", f"--config={path}"]).by_train_images
    assert {key: repr(value) for key, value in row.settings.items()} == {
        "optim.lr": "0.001", "optim.layer_decay": "1.0", "data.flip": "False",
        "data.global_batch_size": "32", "data.sizes_px": "[8, 12]", "data.image_size_px": "12",
    }  # fmt: skip


@pytest.mark.parametrize(
    "setting",
    ["run: {output: x}", "run: {seed: 3}", "data: {root: x}", "data: {val_fraction: 0.2}",
     "trainer: {devices: '2'}", "trainer: {monitor: val/acc}"],
)  # fmt: skip
def test_settings_that_are_needed_before_the_count_are_refused(
    setting: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(f"by_train_images:\n- {setting}\n")
    assert cli.main(["fit", f"--config={path}", "--data.root=/nowhere"]) == 78
    section, _, field = setting.partition(": {")
    key = f"{section}.{field.partition(':')[0]}"
    line = f"by_train_images has {key}, which is needed before the training images are counted"
    assert line in capsys.readouterr().err


def test_every_recipe_chooses_only_what_the_command_line_can_set() -> None:
    known = {
        f"{section}.{name}"
        for section, fields in parser.SECTIONS.items()
        for name in fields.__dataclass_fields__
    }
    for name in parser.recipe_names():
        command = cli.parse(["fit", "--config", name])
        assert {*size_table.setting_names(command.by_train_images)} <= known
        for row in command.by_train_images:
            config.check(size_table.with_settings(command.config, row.settings))
