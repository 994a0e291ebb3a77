"""What of a net trains, at which rates, from which weights."""

from contextlib import suppress
from dataclasses import asdict

from lightship.config import Config
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.doctor.samples import first_samples
from lightship.errors import LightshipError
from lightship.models.classifier import ImageClassifier
from lightship.models.finetune import check_batch_norm
from lightship.models.nets.weights import read_weights
from lightship.models.preprocessing import adopt, of_weights

_USUAL_SIZE_PX = 224


def fine_tuning(context: Context) -> Finding:
    """Read the weights, and count what trains at which rate. Blocks.

    Raises:
        ConfigError: See `plan`.
    """
    weights, classes = context.config.model.weights, None
    if weights is None:
        return skipped("--model.weights is not set: all parameters train from random values")
    with suppress(LightshipError):  # the check `data` reports it
        classes = context.once(first_samples).classes
    found = plan(context.config, [str(number) for number in range(classes or 2)], are_names=False)
    if classes is None:
        found += " (head: of 2 classes, as their number is not known yet)"
    if weights == "default":
        found += "; published weights, not read here"
    return Finding("ok", found, "see --print_config")


def plan(config: Config, class_names: list[str], are_names: bool = True) -> str:
    """The numbers of parameters and their rates, as fit logs them. Blocks.

    Reads the weights, unless they are `default`, and adopts their preprocessing.

    Args:
        config: The settings.
        class_names: The classes in label order.
        are_names: Whether they are the names of the data, with which those of a checkpoint's last
            layer are compared, and not just as many.

    Raises:
        ConfigError: The net cannot be built, the weights are not of that net, or it has no
            BatchNorm whose statistics could be `precise`.
    """
    asked, data = config.model, config.data
    weights = None
    if asked.weights not in (None, "default"):
        weights = read_weights(asked.net, str(asked.weights))
        own = of_weights(asked.net, weights)
        adopt(data, {name: value for name, value in own.items() if value is not None})
    model = ImageClassifier(
        asked.net,
        class_names,
        data.image_size_px or _USUAL_SIZE_PX,
        data.mean or [0.5] * 3,
        data.std or [0.5] * 3,
        optim=asdict(config.optim),
        freeze=asked.freeze,
        unfreeze_epoch=asked.unfreeze_epoch,
    )
    check_batch_norm(model.net, config.model.net, config.model.batch_norm)
    if weights is not None:
        model.load_weights(weights if are_names else weights._replace(hyper_parameters={}))
    return model.rates_line
