"""What of a net trains, at which rates, from which weights."""

import dataclasses
from contextlib import suppress

from lightship.config import Config
from lightship.doctor import samples
from lightship.doctor.checks import Finding, skipped
from lightship.doctor.context import Context
from lightship.errors import LightshipError
from lightship.models.classifier import ImageClassifier
from lightship.models.finetune import check_batch_norm
from lightship.models.nets.weights import read_weights
from lightship.models.preprocessing import adopt, of_weights

_USUAL_SIZE_PX = 224


def plan(config: Config, class_names: list[str]) -> str:
    """The numbers of parameters and their rates, as fit logs them. Blocks.

    Reads the weights, unless they are `default`, and adopts their preprocessing.

    Raises:
        ConfigError: The net cannot be built, the weights are not of that net, or it has no
            BatchNorm whose statistics could be `precise`.
    """
    url, weights = config.model.weights, None
    if url not in (None, "default"):
        assert url is not None
        weights = read_weights(config.model.net, url)
        own = of_weights(config.model.net, weights)
        adopt(config.data, {name: value for name, value in own.items() if value is not None})
    data = config.data
    model = ImageClassifier(
        net=config.model.net,
        class_names=class_names,
        image_size_px=data.image_size_px or _USUAL_SIZE_PX,
        mean=data.mean or [0.5] * 3,
        std=data.std or [0.5] * 3,
        optim=dataclasses.asdict(config.optim),
        freeze=config.model.freeze,
        unfreeze_epoch=config.model.unfreeze_epoch,
    )
    check_batch_norm(model.net, config.model.net, config.model.batch_norm)
    if weights is not None:
        model.load_weights(weights)
    return model.rates_line


def fine_tuning(context: Context) -> Finding:
    """Read the weights, and count what trains at which rate. Blocks.

    Raises:
        ConfigError: See `plan`.
    """
    config = context.config
    if config.model.weights is None:
        return skipped("--model.weights is not set: all parameters train from random values")
    classes = None
    with suppress(LightshipError):  # the check `data` reports it
        classes = context.once(samples.first_samples).result().classes
    names = [str(number) for number in range(classes or 2)]
    found = plan(config, names)
    if classes is None:
        found += " (head: of 2 classes, as their number is not known yet)"
    if config.model.weights == "default":
        found += "; published weights, not read here"
    return Finding("ok", found, "see --print_config")
