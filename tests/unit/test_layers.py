"""The rooms' dependencies: down only, no circles, and some packages have a sole importer."""

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import lightship

ROOT = Path(lightship.__file__).parent

EVERYWHERE = {"extras", "redaction", "safe_text"}
"""Plain text and functions of text, which any room may use."""
# Room -> the other rooms it may import, wherever in a file the import stands.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "redaction": set(),
    "safe_text": set(),
    "extras": set(),
    "errors": set(),
    "host": set(),
    "strict_json": set(),
    "strict_yaml": set(),
    "config": {"errors"},
    "devices": {"errors"},
    "versions": {"errors", "config"},
    "choices": {"errors", "config"},
    "console": {"errors"},
    "distributed": {"errors", "config", "console", "host"},
    "storage": {"errors"},
    "checkpoint": {"errors", "devices", "host", "storage", "versions"},
    "data": {
        "errors", "config", "console", "devices", "distributed", "host", "storage", "versions",
    },
    "models": {"errors", "checkpoint", "config", "data", "devices", "storage", "versions"},
    "run": {"errors", "checkpoint", "config", "storage", "strict_json", "strict_yaml", "versions"},
    "tracking": {"errors", "storage"},
    "training": {
        "errors", "checkpoint", "config", "console", "data", "devices", "distributed", "models",
        "tracking",
    },
    "exporters": {"config", "errors", "models", "storage"},
    "predict": {"errors", "storage", "versions"},
    "report": {"errors", "data", "distributed", "models", "storage", "strict_json"},
    "doctor": {
        "errors", "config", "console", "data", "devices", "distributed", "host", "models", "run",
        "storage", "tracking", "training",
    },
    "commands": {
        "errors", "checkpoint", "choices", "config", "console", "data", "devices", "distributed",
        "doctor", "exporters", "models", "predict", "report", "run", "storage", "strict_json",
        "tracking", "training",
    },
    "cli": {
        "errors", "choices", "commands", "config", "console", "data", "distributed", "predict",
        "run", "storage", "strict_yaml", "versions",
    },
    "__main__": {"cli"},
}  # fmt: skip
SOLE_IMPORTERS = {
    "fsspec": "storage", "s3fs": "storage", "obstore": "storage", "wandb": "tracking",
    "torch_xla": "devices", "timm": "models", "onnx": "exporters", "onnxruntime": "exporters",
}  # fmt: skip
WITHOUT_CONFIG = ["data/order.py", "data/augment.py", "models/nets", "models/optim"]
"""Modules and folders that take plain values."""
SLOW = {"torch", "lightning", "torchvision", "torchmetrics", "fsspec", "PIL", "numpy"}
WITHOUT_SLOW = ["cli", "commands/base.py", "config.py", "console", "errors.py"]
WITHOUT_SLOW += ["distributed/signals.py", "predict/table.py", "__init__.py", "__main__.py"]
"""What is imported before a command line is known to be right."""
OPTIONAL = {"wandb", "s3fs", "obstore", "torch_xla", "pyarrow", "sklearn", "onnx"}
OPTIONAL |= {"onnxscript", "onnxruntime", "timm", "huggingface_hub"}

LOCAL_IMPORTS = {
    "a wrong command line is refused without torch and fsspec": {
        "cli/__init__.py": """
            lightship.commands.dispatch.run
        """,
        "cli/command_line.py": "lightship.run.config_file lightship.storage",
    },
    "an agent, which trains nothing, starts without torch (as far as it can) and Lightning": {
        "commands/dispatch.py": """
            lightship.commands.doctor.doctor lightship.commands.evaluate
            lightship.commands.export.export lightship.commands.fit.fit
            lightship.commands.pack.pack lightship.commands.predict.predict
            lightship.commands.print_config.print_config
            lightship.data.decode_ahead lightship.data.streaming.worker_process.Worker
            lightship.run.folder.RunFolder
            lightship.training.callbacks.heartbeat
            lightship.training.out_of_memory.as_config_error
        """,
        "distributed/launcher.py": """
            lightship.distributed.comm lightship.distributed.elastic_agent.run_agent torch
        """,
        "distributed/comm.py": "lightning",
        "distributed/slurm.py": "lightning",
    },
    "a data worker does without torch": {"data/images/scaling.py": "torch"},
    "doctor shows its first rows without torch": {
        "doctor/output.py": "lightship.run.folder.RunFolder"
    },
    "an optional package": {
        "exporters/formats.py": "onnxruntime",
        "data/sources/parquet_file.py": "pyarrow",
        "devices/xla.py": "torch_xla",
        "models/nets/published.py": "huggingface_hub",
        "models/nets/timm_nets.py": "timm",
        "predict/table.py": "pyarrow",
        "storage/obstore_s3.py": "obstore",
    },
    "slow to import, and most processes do not need it": {
        "console/screen.py": "rich",
        "models/nets/weights.py": "safetensors",
        "report/html.py": "jinja2",
        "storage/web.py": "aiohttp",
        "tracking/service.py": "wandb",
        "tracking/settings.py": "wandb",
        "tracking/start.py": "wandb",
        "tracking/tracker.py": "wandb",
    },
}
"""Reason -> module -> what it imports within functions; a package that is not ours by its name."""
MAX_FUNCTION_LINES = 60


@functools.cache
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


def imports_at_top(tree: ast.Module) -> list[str]:
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports(ast.Module(list(top), []))


def room(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


def within(module: str, places: list[str]) -> bool:
    return any(module == place or module.startswith(f"{place}/") for place in places)


def test_rooms_import_only_what_lies_below() -> None:
    wrong = []
    for module, tree in modules().items():
        allowed = {room(module), "__version__", *EVERYWHERE, *ALLOWED[room(module)]}
        for name in imports(tree):
            parts = name.split(".")
            if parts[0] == "lightship" and parts[1] not in allowed:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_rooms_have_no_circle() -> None:
    order = [*TopologicalSorter(ALLOWED).static_order()]
    assert {room(module) for module in modules()} == set(order)


def test_the_picture_of_the_architecture_is_current() -> None:
    """Its arrows are `ALLOWED` between folders, less those that follow from other arrows."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    below: dict[str, set[str]] = {}
    expected = {}
    for name in TopologicalSorter(ALLOWED).static_order():
        direct = ALLOWED[name] & folders
        implied = set().union(*(below[other] for other in direct))
        below[name] = direct | implied
        if name in folders and direct - implied:
            expected[name] = direct - implied
    page = (ROOT.parents[1] / "docs/architecture.md").read_text()
    [picture] = re.findall(r"^```mermaid\nflowchart TD\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    arrows = dict(line.strip().split(" --> ") for line in picture.splitlines())
    drawn = {name: set(others.split(" & ")) for name, others in arrows.items()}
    assert drawn == expected, "the picture is in docs/architecture.md"
    described = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert described == folders | {"recipes"}


def test_modules_have_no_circle() -> None:
    """Neither by imports at the top, nor within functions, nor for types alone."""
    names = {module.removesuffix(".py").replace("/", "."): module for module in modules()}
    names = {name.removesuffix(".__init__"): module for name, module in names.items()}
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for module, tree in modules().items():
        for name in imports(tree):
            parts = name.removeprefix("lightship.").split(".")
            candidates = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
            found = [names[name] for name in candidates if name in names]
            graph[module] |= set(found[:1]) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_sole_importers() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, tree in modules().items()
        for name in imports(tree)
        if (owner := SOLE_IMPORTERS.get(name.split(".")[0])) and room(module) != owner
    ]
    assert not wrong


def test_leaves_take_plain_values() -> None:
    for module, tree in modules().items():
        if within(module, WITHOUT_CONFIG):
            assert not any(name.startswith("lightship.config") for name in imports(tree)), module


def test_optional_packages_are_imported_where_used() -> None:
    wrong = [
        f"{module} imports {name} at its top"
        for module, tree in modules().items()
        for name in imports_at_top(tree)
        if name.split(".")[0] in OPTIONAL
    ]
    assert not wrong


def test_a_command_line_is_parsed_without_torch() -> None:
    for module, tree in modules().items():
        if within(module, WITHOUT_SLOW):
            names = {name.split(".")[0] for name in imports_at_top(tree)}
            assert not names & SLOW, module


def test_modules_say_what_they_are() -> None:
    for module, tree in modules().items():
        assert ast.get_docstring(tree), f"{module} has no docstring"
        assert Path(module).stem not in {"utils", "common", "helpers"}


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_imports_within_functions_have_a_reason() -> None:
    """Other imports are at the top; the list names none that is gone."""
    expected = {
        (module, name)
        for modules_of_reason in LOCAL_IMPORTS.values()
        for module, names in modules_of_reason.items()
        for name in names.split()
    }
    found = {
        (module, name if name.startswith("lightship.") else name.split(".")[0])
        for module, tree in modules().items()
        for function in functions(tree)
        for name in imports(function)
    }
    assert found == expected


def test_functions_are_short() -> None:
    long = {
        f"{module}:{function.name}"
        for module, tree in modules().items()
        for function in functions(tree)
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long, f"more than {MAX_FUNCTION_LINES} lines"
