"""What was done to an image, told to the model: between the image tower and the space of UniCLIP.

With h the pooled feature of an image and alpha the parameters of its view (arXiv 2209.13430, whose
code is not public, so that the shapes are ours):

    a = f_A(alpha)        h' = h + g([h, a])        feature = normalize(projection of h')

f_A and g are perceptrons with one hidden layer. The last layer of f_A starts at zero: the space
starts as one that knows nothing of alpha, and learns to use it from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import AugmentationConfig

# The parameters of an image that nothing was done to, as views report them in training: box (left,
# top, width, height as shares of the sides), flipped, jittered, brightness - 1, contrast - 1,
# saturation - 1, hue, grey, blurred, sigma / 2.
IDENTITY = (0.0, 0.0, 1.0, 1.0, *[0.0] * 9)


class AugmentationHead(nn.Module):
    """f_A and g: pooled (b, W) and parameters (b, 13) -> (b, W).

    Args:
        cfg: the widths of the two. width: W, of the image tower's pooled feature.
    """

    def __init__(self, cfg: AugmentationConfig, width: int) -> None:
        super().__init__()
        self.encoder = _perceptron(len(IDENTITY), cfg.width, cfg.width)
        self.head = _perceptron(width + cfg.width, cfg.hidden, width)
        nn.init.zeros_(self.encoder[-1].weight)
        nn.init.zeros_(self.encoder[-1].bias)

    def forward(self, pooled: Tensor, parameters: Tensor | None) -> Tensor:
        """Pooled features that know what was done to their images.

        Args:
            pooled: (b, W). parameters: (b, 13) float; None: nothing was done to any image.

        Returns:
            (b, W), of the type of `pooled`.
        """
        if parameters is None:
            parameters = pooled.new_tensor(IDENTITY).expand(len(pooled), -1)
        told = self.encoder(parameters.to(pooled.dtype))
        return pooled + self.head(torch.cat([pooled, told], 1))


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
