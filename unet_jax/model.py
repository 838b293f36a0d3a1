"""The U-Net (Ronneberger, Fischer, Brox 2015, arXiv:1505.04597), with padding so that sizes are kept.

The encoder (the paper's contracting path) has blocks of widths[0], widths[1], ... with downsampling between them. The
decoder (expansive path) goes back up: each block takes the skip connection and the upsampled features, concatenated.
A 3x3 and a 1x1 convolution give the logits. Parameter names and shapes stay the same between versions.
"""

from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from unet_jax import layers as plain_layers
from unet_jax.checks import check_sampling, check_size
from unet_jax.config import Downsampling, Upsampling
from unet_jax.errors import InputError


class DoubleConv(nn.Module):
    """(conv 3x3 -> ReLU -> batch norm) twice, then dropout: [N, H, W, I] to [N, H, W, features]."""

    features: int
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    layers: Any = plain_layers

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for i in (1, 2):
            x = self.layers.Conv(self.features, dtype=self.dtype, name=f"conv{i}")(x)
            x = self.layers.BatchNorm(name=f"norm{i}")(self.layers.relu(x), train)
        return self.layers.Dropout(self.dropout_rate, deterministic=not train)(x)


class Upsample(nn.Module):
    """Doubles height and width and sets the features: [N, H, W, I] to [N, 2H, 2W, features].

    As published, batch norm and ReLU follow the resize, and nothing follows the transposed convolution.
    """

    features: int
    method: Upsampling
    dtype: DTypeLike = jnp.float32
    layers: Any = plain_layers

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if self.method == "transposed_conv":
            return self.layers.TransposedConv(self.features, dtype=self.dtype, name="conv")(x)
        # The published code resizes first. A 1x1 conv and a resize commute (the resize's weights sum to 1, so the bias
        # stays too). In this order the conv takes a quarter of the time.
        x = self.layers.Conv(self.features, kernel_size=1, dtype=self.dtype, name="conv")(x)
        x = self.layers.BatchNorm(name="norm")(self.layers.resize_double(x), train)
        return self.layers.relu(x)


class UNet(nn.Module):
    """Images [N, H, W, C], H and W multiples of 2^(levels-1), to float32 (or float64) logits [N, H, W, num_classes].

    Dropout draws from the "dropout" key when `train`; batch norm's running statistics are in "batch_stats". `dtype` is
    what the layers compute in; parameters and statistics are float32. With `remat` the gradient computes each block's
    inner activations again (Chen et al. 2016, arXiv:1604.06174). `layers` may be another module with the same names:
    `train.make_model` chooses the one that is fast on the device.

    Raises:
      InputError: height or width is not a multiple of 2^(levels-1), pictures are integers, or a method is unknown.
      AssertionError: a picture without the axis of the batch.
    """

    downsampling: Downsampling = "max_pool"
    upsampling: Upsampling = "transposed_conv"
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    num_classes: int = 3
    dropout_rate: float = 0.3
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    layers: Any = plain_layers

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        chex.assert_rank(images, 4)
        check_sampling(self.downsampling, self.upsampling)
        check_size(images.shape[1], images.shape[2], len(self.widths))
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"pictures are {images.dtype}: they must be floats from 0 to 1 (uint8 divided by 255)")
        block = nn.remat(DoubleConv, static_argnums=(2,)) if self.remat else DoubleConv
        common: dict[str, Any] = {"dtype": self.dtype, "layers": self.layers}
        x, skips, levels = images, [], len(self.widths)
        for i, width in enumerate(self.widths):
            # As published, dropout is in the encoder's two deepest blocks.
            rate = self.dropout_rate if i >= levels - 2 else 0.0
            x = block(width, rate, **common, name=f"encoder{i + 1}")(x, train)
            if i < levels - 1:
                skips.append(x)
                if self.downsampling == "max_pool":
                    x = self.layers.max_pool(x)
                else:
                    x = self.layers.Conv(width, strides=2, dtype=self.dtype, name=f"down{i + 1}")(x)
        for i, (width, skip) in reversed(list(enumerate(zip(self.widths[:-1], skips, strict=True)))):
            x = Upsample(width, self.upsampling, **common, name=f"up{i + 1}")(x, train)
            x = block(width, **common, name=f"decoder{i + 1}")(self.layers.join([skip, x]), train)
        x = self.layers.Conv(self.widths[0], dtype=self.dtype, name="head")(x)  # as published, without ReLU
        logits = self.layers.Conv(self.num_classes, kernel_size=1, dtype=self.dtype, name="logits")(x)
        return logits.astype(plain_layers.wide_dtype(logits))
