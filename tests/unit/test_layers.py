"""The house's arrows: dependencies point down only, and some packages have a sole importer."""

import ast
from pathlib import Path

import lightship

ROOT = Path(lightship.__file__).parent

# Room -> the rooms it may import. A room not listed may be imported by every other.
ALLOWED = {
    "exits": set(),
    "signals": set(),
    "host_environment": {"exits"},
    "streams": {"exits"},
    "ranks": {"exits"},
    "agent": {"exits", "signals"},
    "slurm": {"exits"},
    "shared_memory": {"exits"},
    "batch": set(),
    "quiet": set(),
    "devices": {"exits"},
    "config": {"exits"},
    "flags": {"config"},
    "storage": {"exits"},
    "strict_yaml": set(),
    "versions": {"exits", "config"},
    "kept": {"exits", "config", "storage", "strict_yaml", "versions"},
    "damaged": {"storage"},
    "payload": {"exits", "devices"},
    "record": {"exits", "versions"},
    "checkpoint": {"exits", "storage", "payload", "record", "versions"},
    "data": {"exits", "batch", "config", "devices", "ranks", "storage", "versions"},
    "model": {"exits", "batch", "config", "devices", "storage", "versions"},
    "metrics_table": {"storage"},
    "background": set(),
    "tracking": {"exits", "background", "storage"},
    "strict_json": set(),
    "report": {"exits", "storage", "strict_json"},
    "starts": {"storage", "damaged"},
    "table": {"exits"},
    "parts": {"exits", "storage", "table", "versions"},
    "output": {
        "exits", "config", "storage", "strict_json", "checkpoint", "damaged", "kept", "record",
    },
    "callbacks": {
        "exits", "batch", "checkpoint", "devices", "storage", "metrics_table", "tracking", "model",
        "parts", "table", "signals", "streams",
    },
}  # fmt: skip
TOP = {
    "cli", "launch", "run", "findings", "measure", "predict", "export", "restored", "doctor",
    "trainer", "__main__", "__init__",
}  # fmt: skip
SOLE_IMPORTERS = {"fsspec": "storage", "wandb": "tracking", "s3fs": "storage", "obstore": "storage"}
SOLE_IMPORTERS |= {"torch_xla": "devices", "onnx": "export", "onnxruntime": "export"}
LEAVES = ["data/order.py", "data/augment.py", "model/litcnn.py", "model/zoo.py"]
LEAVES += ["model/speednet.py", "model/muon.py", "model/optim.py", "model/traced_optim.py"]
LEAVES += ["model/stepping.py", "model/outcomes.py"]
SLOW = {"torch", "lightning", "torchvision", "torchmetrics", "matplotlib", "fsspec", "PIL", "numpy"}
IMPORTED_WHERE_USED = {"wandb", "s3fs", "obstore", "torch_xla", "pyarrow", "matplotlib", "sklearn"}
IMPORTED_WHERE_USED |= {"onnx", "onnxscript", "onnxruntime"}


def modules() -> dict[str, ast.Module]:
    paths = sorted(ROOT.rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def imports(tree: ast.AST) -> list[str]:
    """Full dotted names imported anywhere in `tree`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{name.name}" for name in node.names]
    return found


def room(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def test_rooms_import_only_what_lies_below() -> None:
    wrong = []
    for module, tree in modules().items():
        own = room(module)
        if own in TOP:
            continue
        for name in imports(tree):
            parts = name.split(".")
            allowed = {own, "__version__", *ALLOWED[own]}
            if parts[0] == "lightship" and parts[1] not in allowed:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_every_room_has_its_arrows() -> None:
    assert {room(module) for module in modules()} <= set(ALLOWED) | TOP


def test_sole_importers() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in modules().items()
        for name in imports(tree)
        if (owner := SOLE_IMPORTERS.get(name.split(".")[0])) and room(module) != owner
    ]
    assert not wrong


def test_leaves_take_plain_values() -> None:
    for leaf in LEAVES:
        assert not any(name.startswith("lightship.config") for name in imports(modules()[leaf]))


def test_heavy_packages_are_imported_where_used() -> None:
    wrong = [
        f"{module} imports {name} at its top"
        for module, tree in modules().items()
        for node in tree.body
        for name in imports(ast.Module([node], []))
        if isinstance(node, ast.Import | ast.ImportFrom)
        if name.split(".")[0] in IMPORTED_WHERE_USED
    ]
    assert not wrong


def test_the_parser_does_not_import_torch() -> None:
    for module in (
        "cli.py",
        "flags.py",
        "table.py",
        "config.py",
        "exits.py",
        "signals.py",
        "host_environment.py",
        "streams.py",
        "__init__.py",
        "__main__.py",
    ):
        top = [
            node for node in modules()[module].body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {name.split(".")[0] for name in imports(ast.Module(list(top), []))}
        assert not names & SLOW, module


def test_rooms_are_small_and_say_what_they_are() -> None:
    for module, tree in modules().items():
        assert ast.get_docstring(tree), f"{module} does not say what it is"
        assert len((ROOT / module).read_text().splitlines()) <= 400, f"{module} is too long"
        assert Path(module).stem not in {"utils", "common", "helpers"}
