"""Settings that a fit chooses itself, as config files have them."""

from pathlib import Path

import pytest

from lightship import choices, cli, config
from lightship.cli import parser
from lightship.errors import UsageError

ROWS = [
    {"up_to": 500, "trainer": {"max_epochs": 20}, "data": {"global_batch_size": 16}},
    {"up_to": 4000, "trainer": {"max_epochs": 8}},
    {"trainer": {"max_epochs": 4}},
]


def test_the_first_row_that_holds_the_set_is_chosen() -> None:
    found = choices.take({"by_train_images": ROWS}, "x")
    assert [found.of_size(n).get("trainer.max_epochs") for n in (1, 500, 501)] == [20, 20, 8]
    assert found.of_size(4000) == {"trainer.max_epochs": 8}
    assert found.of_size(10**9) == {"trainer.max_epochs": 4}
    assert choices.Choices().of_size(5) == {}
    assert found.names == ["data.global_batch_size", "trainer.max_epochs"]


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
        choices.take({"by_train_images": rows}, "x")


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
        return dict(command.choices.of_size(50))

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
    (row,) = cli.parse(["fit", f"--config={path}"]).choices.by_train_images
    assert {key: repr(value) for key, value in row.settings.items()} == {
        "optim.lr": "0.001", "optim.layer_decay": "1.0", "data.flip": "False",
        "data.global_batch_size": "32", "data.sizes_px": "[8, 12]", "data.image_size_px": "12",
    }  # fmt: skip


BY_NET = """
without_batch_norm:
  data: {flip: false, sizes_px: null}
  optim: {lr: 1e-4}
"""


def test_flags_and_later_files_win_over_the_choice_by_the_net(tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{name}.yaml" for name in ("one", "two", "three"))
    one.write_text(FILE + BY_NET)
    two.write_text(
        "data: {sizes_px: [8], image_size_px: 8}\nwithout_batch_norm: {optim: {layer_decay: 0.5}}"
    )
    three.write_text("by_train_images: [{up_to: 5, optim: {lr: 0.3}}, {data: {flip: true}}]")

    def chosen(*flags: str) -> dict[str, object]:
        command = cli.parse(["fit", f"--config={one}", *flags])
        assert {*command.choices.without_batch_norm} <= {*command.choices.names}
        return dict(command.choices.without_batch_norm)

    assert chosen() == {"data.flip": False, "data.sizes_px": None, "optim.lr": 1e-4}
    assert chosen("--optim.lr=1e-4") == {"data.flip": False, "data.sizes_px": None}
    assert chosen(f"--config={two}") == {
        "data.flip": False, "optim.lr": 1e-4, "optim.layer_decay": 0.5,
    }  # fmt: skip
    assert chosen(f"--config={three}") == {"data.sizes_px": None}


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        ("[3]", 2, "without_batch_norm must hold sections of settings"),
        ("{optim: 3}", 2, "without_batch_norm has optim, which must hold fields"),
        ("{optim: {rate: 3}}", 2, "unknown key optim.rate"),
        ("{optim: {lr: fast}}", 2, "--optim.lr is 'fast'"),
        ("{optim: {lr: 1000}}", 78, "--optim.lr is 1000.0; it must be at least 0 and at most 100"),
        ("{run: {seed: 3}}", 78, "without_batch_norm has run.seed, which is needed before"),
        ("{model: {net: resnet18}}", 78, "has model.net, which is what it depends on"),
    ],
)
def test_the_choice_by_the_net_is_checked_before_anything_is_read(
    content: str, code: int, line: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "one.yaml"
    path.write_text(f"without_batch_norm: {content}")
    assert cli.main(["fit", f"--config={path}", "--data.root=/nowhere"]) == code
    assert line in capsys.readouterr().err


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
        assert {*command.choices.names} <= known
        for row in command.choices.by_train_images:
            config.check(choices.with_settings(command.config, row.settings))
