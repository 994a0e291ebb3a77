"""The report's data, from all ranks of a run that has just been evaluated."""

from typing import Any

from lightship.data.module import ImageData
from lightship.distributed import comm
from lightship.models.classifier import ImageClassifier
from lightship.report import ReportData, Shown
from lightship.report.error_analysis import find_mistakes


def collect_report(
    model: ImageClassifier, data: ImageData, split: str | None, num_examples: int, **about: Any
) -> ReportData | None:
    """Gather what the report shows of an evaluation. Every rank; blocks.

    Args:
        model: As it was evaluated.
        data: What it was evaluated on.
        split: The evaluated split; None: there is none.
        num_examples: Images of it shown with their predictions.
        about: The other fields of ReportData, complete on rank 0.

    Returns:
        None on ranks other than 0.
    """
    mistakes = find_mistakes(model, data, split) if split else {}
    skipped = comm.gather_to_rank_0(data.skipped)
    return comm.on_rank_0(
        lambda: ReportData(
            class_names=model.class_names,
            predictions=_examples(model, data, split, num_examples)
            if split and num_examples
            else [],
            skipped=sorted({line for each in skipped for line in each}),
            **mistakes,
            **about,
        )
    )


def _examples(model: ImageClassifier, data: ImageData, split: str, count: int) -> list[Shown]:
    """Predictions for `count` images spread evenly over the split."""
    images, labels, ids = data.examples(split, count)
    if not len(images):
        return []
    probabilities = model.probabilities(images)
    names, manifest = model.class_names, data.manifests[split]
    return [
        Shown(
            image.permute(1, 2, 0).numpy(),
            names[int(label)],
            names[int(row.argmax())],
            float(row.max()),
            path=manifest.name(int(id)),
        )
        for image, label, id, row in zip(images, labels, ids, probabilities, strict=True)
    ]
