"""What a fit chooses by its training images and by its net, and why: `lightship.choices`."""

from typing import Any

from lightship import choices
from lightship.commands.base import Command
from lightship.config import Config, check
from lightship.models.finetune import batch_norms
from lightship.models.head import has_linear_head
from lightship.models.nets.build import outline
from lightship.models.preprocessing import of_net

_CLASSES = 2  # a net's structure is the same for any number
_USUAL_SIZE_PX = 224
_HEAD_INIT = "model.head_init"


def choose(command: Command, num_images: int | None) -> str:
    """Complete a command's settings by the number of training images, then by the net. Any rank.

    Blocks while the net is built, if its recipe has settings for nets without BatchNorm: for most
    nets under a second, without memory; the user's own function is called.

    Args:
        command: The settings chosen are set in its `config`.
        num_images: Number of training images; None: not known, and nothing is chosen by it.

    Returns:
        What was chosen and why, as a line; empty: nothing.

    Raises:
        ConfigError: The net cannot be built, or the settings do not go together.
    """
    config, left_open = command.config, command.choices
    chosen: dict[str, Any] = {}
    reasons = []
    if num_images is not None and (by_images := left_open.of_size(num_images)):
        reasons.append(f"{num_images:,} training images")
        chosen.update(by_images)
        choices.assign(config, chosen)
    if by_net := _by_net(left_open.without_batch_norm, config):
        reasons.append("a net without BatchNorm")
        chosen.update(by_net)
        choices.assign(config, by_net)
        check(config, starts_anew=command.ckpt_path is None)
    return f"chosen for {' and '.join(reasons)}: {choices.as_flags(chosen)}" if chosen else ""


def _by_net(settings: choices.Settings, config: Config) -> choices.Settings:
    """Those of the settings that apply to the net of a configuration."""
    if not settings:
        return {}
    name = config.model.net
    size_px = config.data.image_size_px or of_net(name).get("image_size_px") or _USUAL_SIZE_PX
    net = outline(name, _CLASSES, size_px)
    if batch_norms(net):
        return {}
    if settings.get(_HEAD_INIT) == "features" and not has_linear_head(net):
        return {key: value for key, value in settings.items() if key != _HEAD_INIT}
    return settings
