"""The reference network and its two losses in PyTorch, for the parity check, the benchmark and the training comparison.

NCHW. Its state dict has the names of the reproduced runs, which unet_jax/from_pytorch.py reads. Needs extra `bench`.
"""

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """(conv 3x3 -> ReLU -> batch norm) twice, then dropout. It also holds a change of level, which UNet calls."""

    def __init__(self, in_features: int, features: int, transition_layer: nn.Module, dropout_rate: float = 0.0) -> None:
        """`transition_layer`: the downsampling after an encoder's block, the upsampling before a decoder's."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_features, features, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(features)
        self.dropout = nn.Dropout(dropout_rate)
        self.transition_layer = transition_layer

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] to [N, features, H, W]."""
        x = self.bn1(F.relu(self.conv1(x)))
        return self.dropout(self.bn2(F.relu(self.conv2(x))))


class UNet(nn.Module):
    """Images [N, 3, H, W] to logits [N, num_classes, H, W]; names for five widths: cblock1-5, ublock6-9, conv10-11."""

    def __init__(
        self,
        downsampling: Literal["max_pool", "strided_conv"] = "max_pool",
        upsampling: Literal["transposed_conv", "resize"] = "transposed_conv",
        widths: tuple[int, ...] = (32, 64, 128, 256, 512),
        num_classes: int = 3,
        dropout_rate: float = 0.3,
    ) -> None:
        """The arguments of unet_jax.model.UNet."""
        super().__init__()
        levels = len(widths)
        self.encoders = [f"cblock{i + 1}" for i in range(levels)]
        self.decoders = [f"ublock{levels + 1 + i}" for i in range(levels - 1)]
        self.head, self.logits = f"conv{2 * levels}", f"conv{2 * levels + 1}"

        def down(width: int) -> nn.Module:
            return nn.MaxPool2d(2) if downsampling == "max_pool" else nn.Conv2d(width, width, 3, stride=2, padding=1)

        def up(in_features: int, width: int) -> nn.Module:
            if upsampling == "transposed_conv":
                return nn.ConvTranspose2d(in_features, width, 3, stride=2, padding=1, output_padding=1)
            resize = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            return nn.Sequential(resize, nn.Conv2d(in_features, width, 1), nn.BatchNorm2d(width), nn.ReLU())

        for i, (name, width) in enumerate(zip(self.encoders, widths, strict=True)):
            rate = dropout_rate if i >= levels - 2 else 0.0
            # The last block's change of level is never called; where it is a conv, its weights stay as they are.
            self.add_module(name, Block(widths[i - 1] if i else 3, width, down(width), rate))
        for name, (width, below) in zip(self.decoders, reversed(list(pairwise(widths))), strict=True):
            self.add_module(name, Block(2 * width, width, up(below, width)))
        self.add_module(self.head, nn.Conv2d(widths[0], widths[0], 3, padding=1))
        self.add_module(self.logits, nn.Conv2d(widths[0], num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Height and width are multiples of 2^(levels-1)."""
        skips = []
        for name in self.encoders:
            block: Any = self.get_submodule(name)
            skips.append(block(x))
            x = block.transition_layer(skips[-1]) if name != self.encoders[-1] else skips.pop()
        for name in self.decoders:
            block = self.get_submodule(name)
            x = block(torch.cat([skips.pop(), block.transition_layer(x)], dim=1))
        return self.get_submodule(self.logits)(self.get_submodule(self.head)(x))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over pixels; logits [N, C, H, W], labels [N, H, W] of int64."""
    return F.cross_entropy(logits, labels)


def log_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(2I / (I + N + 1e-6)): I the sum over the batch of the true class's probability, N the number of pixels."""
    overlap = logits.softmax(dim=1).gather(1, labels[:, None]).sum()
    return -torch.log(2 * overlap / (overlap + labels.numel() + 1e-6))
