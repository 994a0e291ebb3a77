"""litcnn: the convolutional net of the classic Lightning tutorial."""

from torch import Tensor, nn

from lightship.errors import ConfigError

_SMALLEST_PX = 16
"""Two unpadded 3x3 convolutions and a halving, twice, leave one pixel of 16."""


class LitCNN(nn.Sequential):
    """Layers in turn, by a forward of its own: torch 2.11's `compile()` leaves out torch's."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        for layer in self:
            images = layer(images)
        return images


def litcnn(num_classes: int, image_size_px: int) -> LitCNN:
    """Four unpadded 3x3 convolutions (32-32-64-64), two max-pools, then 512-128-classes.

    Args:
        num_classes: Number of outputs.
        image_size_px: Side of the square images.

    Returns:
        A net from float [B, 3, S, S] to logits [B, num_classes]. (The tutorial ends in log_softmax
        and nll_loss; cross-entropy of the logits is the same function.)

    Raises:
        ConfigError: The images are too small for the convolutions.
    """
    if image_size_px < _SMALLEST_PX:
        raise ConfigError(
            f"--model.net litcnn needs images of at least {_SMALLEST_PX} px, not {image_size_px}: "
            f"set --data.image_size_px {_SMALLEST_PX} or more"
        )
    side_px = ((image_size_px - 4) // 2 - 4) // 2
    return LitCNN(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(64 * side_px**2, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU()),
        nn.Linear(128, num_classes),
    )
