"""A run's events as lines for a person; columns keep their place over a run."""

import math
from typing import Any


def duration_text(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on; `-` where it is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def sentence(event: str, facts: dict[str, Any]) -> str:
    """The line of an event (see `Display.show`) with its facts."""
    if event in ("test", "validate"):
        split = {"test": "test", "validate": "val"}[event]
        shown = numbers(facts, *(f"{split}/{key}" for key in _EVALUATED))
        return f"{event}  " + "  ".join(f"{name} {value}" for name, value in shown)
    if event == "work":
        done, total = (f"{facts[key]:,}" for key in ("done", "total"))
        left = "-" if facts["left_s"] is None else duration_text(facts["left_s"])
        said = f"{done:>{len(total)}}/{total} {facts['unit']}  {facts['per_s']:,.0f}/s"
        return f"{said}  left {left}"
    if event == "pace":
        return f"an epoch ({facts['epoch_steps']:,} steps) takes {_about(facts['epoch_s'])}"
    if event == "end":
        return f"training ended at step {facts['step']} after {duration_text(facts['time_s'])}"
    if event == "batch" and "epoch" not in facts:  # outside of a fit
        left = duration_text(math.inf if facts["left_s"] is None else facts["left_s"])
        return f"{_batch(facts)}  left {left}"
    where = part_of("epoch", facts["epoch"], facts["max_epochs"])
    where += "  " + part_of("step", facts["step"], facts["max_steps"])
    if event == "batch":
        return f"{where}  {_batch(facts)}"
    if event == "val":
        names = dict.fromkeys(("val/loss", "val/acc", "val/top5", facts.get("monitor", "val/loss")))
        shown = numbers(facts, *names) + best(facts)
        shown += [(f"train {name}", value) for name, value in numbers(facts, "loss")]
        shown += numbers(facts, "left")
        return f"{where}  VAL  " + "  ".join(f"{name} {value}" for name, value in shown)
    shown = numbers(facts, "loss", "acc", "speed", "wait", "left")
    return f"{where}       " + "  ".join(f"{name} {value}" for name, value in shown)


def _batch(facts: dict[str, Any]) -> str:
    return f"{facts['doing']} {facts['batch']}/{facts['batches'] or '?'}"


_EVALUATED = ("loss", "acc", "balanced_acc", "f1", "top5")
_SHOWN = {
    "loss": ("loss", "train/loss", lambda v: f"{v:.4f}"),
    "acc": ("acc", "train/acc", lambda v: f"{v:.4f}"),
    "speed": ("images/s", "throughput/images_per_s", lambda v: f"{v:<7,.0f}"),
    "wait": ("data wait", "throughput/data_wait", lambda v: f"{v:4.0%}"),
    "left": ("left", "left_s", duration_text),
} | {
    f"{stage}/{key}": (key, f"{stage}/{key}", lambda v: f"{v:.4f}")
    for stage in ("val", "test")
    for key in _EVALUATED
}


def numbers(facts: dict[str, Any], *wanted: str) -> list[tuple[str, str]]:
    """(name, text) of those numbers that are known."""
    picked = [_SHOWN[name] for name in wanted]
    return [(n, text(facts[key])) for n, key, text in picked if facts.get(key) is not None]


def best(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of the best validation so far, by the metric that chooses the checkpoint."""
    if facts.get("best") is None:
        return []
    name = str(facts["monitor"]).removeprefix("val/")
    epochs = len(str(facts["max_epochs"] or ""))
    return [(f"best {name}", f"{facts['best']:.4f} (epoch {facts['best_epoch']:>{epochs}})")]


def part_of(word: str, done: int, total: int | None) -> str:
    """`word done/total`, as wide as it will ever be."""
    if total is None:
        return f"{word} {done}".strip()
    return f"{word} {done:>{len(str(total))}}/{total}".lstrip()


def clock(seconds: float) -> str:
    """What each line begins with."""
    return f"[{duration_text(seconds):>7}] "


def _about(seconds: float) -> str:
    return f"about {seconds:.2g} s" if seconds < 10 else f"about {duration_text(seconds)}"
