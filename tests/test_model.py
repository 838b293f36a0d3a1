"""The network: shapes, parameters, and equality with a textbook U-Net built here from linen's layers."""

import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import losses, metrics
from unet_jax.errors import InputError
from unet_jax.model import DoubleConv, UNet

COMBINATIONS = [(d, u) for d in ("max_pool", "strided_conv") for u in ("transposed_conv", "resize")]
WIDTHS = (3, 4, 6)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


@functools.cache
def variable_shapes(model: nn.Module, channels: int = 3) -> Any:
    side = 2 ** (len(model.widths) - 1)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, channels))))


@functools.cache
def variables(model: nn.Module) -> Any:
    """Variables in which nothing is 0 or 1, made without compiling anything."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return (rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)
        low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.3, 0.3)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, variable_shapes(model))


def changed(tree: dict, path: str, update) -> dict:
    """The tree with update(leaf) at the path "a/b/c"."""
    key, _, rest = path.partition("/")
    return {**tree, key: changed(tree[key], rest, update) if rest else update(np.array(tree[key]))}


# --- shapes and sizes


@pytest.mark.parametrize(("downsampling", "upsampling"), COMBINATIONS)
@pytest.mark.parametrize(
    ("images", "classes", "widths"), [((2, 16, 16, 3), 3, (4, 8, 8)), ((5, 32, 48, 1), 7, (3, 4, 5, 6))]
)
def test_shapes(downsampling, upsampling, images, classes, widths):
    model = UNet(downsampling, upsampling, widths, classes)
    x = jax.ShapeDtypeStruct(images, jnp.float32)
    variables = variable_shapes(model, images[-1])
    logits = jax.eval_shape(model.apply, variables, x)
    chex.assert_shape(logits, (*images[:3], classes))
    trained, updated = jax.eval_shape(
        lambda v, x: model.apply(v, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}), variables, x
    )
    chex.assert_shape(trained, (*images[:3], classes))
    chex.assert_trees_all_equal_shapes_and_dtypes(updated["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize(("height", "width", "nearest"), [(10, 16, "8x16"), (16, 7, "16x8"), (1, 1, "4x4")])
def test_a_size_that_does_not_fit_is_refused_in_one_line(height, width, nearest):
    model = UNet(widths=WIDTHS)
    with pytest.raises(InputError) as error:
        model.apply(variables(model), np.zeros((1, height, width, 3), np.float32))
    assert str(error.value) == (
        f"pictures of {height}x{width} do not fit 3 levels: height and width must be multiples of 4;"
        f" the nearest size is {nearest}"
    )


def test_a_network_without_levels_is_refused():
    with pytest.raises(InputError, match="the network has no widths"):
        UNet(widths=()).init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))


def test_a_picture_without_the_axis_of_the_batch_is_refused():
    with pytest.raises(AssertionError, match="rank"):
        UNet(widths=(4, 4)).init(jax.random.key(0), jnp.zeros((16, 16, 3)))


def test_pictures_of_0_to_255_are_refused():
    with pytest.raises(InputError, match=r"pictures are uint8: .* divided by 255"):
        UNet(widths=(4, 4)).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3), jnp.uint8))


# --- parameters: checkpoints load by these names and shapes

COMMON = """
encoder1/conv1 3,3,3,32
encoder1/conv2 3,3,32,32
encoder2/conv1 3,3,32,64
encoder2/conv2 3,3,64,64
encoder3/conv1 3,3,64,128
encoder3/conv2 3,3,128,128
encoder4/conv1 3,3,128,256
encoder4/conv2 3,3,256,256
encoder5/conv1 3,3,256,512
encoder5/conv2 3,3,512,512
decoder4/conv1 3,3,512,256
decoder4/conv2 3,3,256,256
decoder3/conv1 3,3,256,128
decoder3/conv2 3,3,128,128
decoder2/conv1 3,3,128,64
decoder2/conv2 3,3,64,64
decoder1/conv1 3,3,64,32
decoder1/conv2 3,3,32,32
head 3,3,32,32
logits 1,1,32,3
"""
CHOSEN = {
    "max_pool": "",
    "strided_conv": "down1 3,3,32,32\ndown2 3,3,64,64\ndown3 3,3,128,128\ndown4 3,3,256,256",
    # Kernels of transposed convolutions are [3, 3, out, in].
    "transposed_conv": "up4/conv 3,3,256,512\nup3/conv 3,3,128,256\nup2/conv 3,3,64,128\nup1/conv 3,3,32,64",
    "resize": "up4/conv 1,1,512,256\nup3/conv 1,1,256,128\nup2/conv 1,1,128,64\nup1/conv 1,1,64,32",
}
NORMS = r"(encoder\d/conv\d|decoder\d/conv\d|up\d/conv)"


def golden(downsampling: str, upsampling: str) -> dict[str, dict[str, tuple[int, ...]]]:
    params: dict[str, tuple[int, ...]] = {}
    stats: dict[str, tuple[int, ...]] = {}
    for line in (COMMON + CHOSEN[downsampling] + "\n" + CHOSEN[upsampling]).split("\n"):
        if line:
            name, sizes = line.split()
            kernel = tuple(map(int, sizes.split(",")))
            features = (kernel[2] if name.startswith("up") and upsampling == "transposed_conv" else kernel[3],)
            params |= {f"{name}/kernel": kernel, f"{name}/bias": features}
            if re.fullmatch(NORMS, name) and not (name.startswith("up") and upsampling == "transposed_conv"):
                norm = name.replace("conv", "norm")
                params |= {f"{norm}/scale": features, f"{norm}/bias": features}
                stats |= {f"{norm}/mean": features, f"{norm}/var": features}
    return {"params": params, "batch_stats": stats}


@pytest.mark.parametrize(
    ("downsampling", "upsampling", "count"),
    [
        ("max_pool", "transposed_conv", 8_645_699),
        ("strided_conv", "transposed_conv", 9_429_539),
        ("strided_conv", "resize", 8_037_859),
        ("max_pool", "resize", 7_254_019),
    ],
)
def test_parameters_of_the_full_networks(downsampling, upsampling, count):
    shapes = variable_shapes(UNet(downsampling, upsampling))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
    found: dict[str, dict] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        collection, *names = (entry.key for entry in path)
        found.setdefault(collection, {})["/".join(names)] = leaf.shape
        assert leaf.dtype == jnp.float32
    assert found == golden(downsampling, upsampling)


# --- the textbook


class TextbookBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        for i in (1, 2):
            x = nn.relu(nn.Conv(self.features, (3, 3), padding=1, name=f"conv{i}")(x))
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=f"norm{i}")(x)
        return x


class TextbookUpsample(nn.Module):
    features: int
    method: str

    @nn.compact
    def __call__(self, x, train):
        if self.method == "transposed_conv":
            same_as_pytorch = {"padding": ((1, 2), (1, 2)), "transpose_kernel": True}
            return nn.ConvTranspose(self.features, (3, 3), strides=(2, 2), name="conv", **same_as_pytorch)(x)
        n, h, w, c = x.shape
        scale = jnp.array([(2 * h - 1) / (h - 1), (2 * w - 1) / (w - 1)])
        x = jax.image.scale_and_translate(
            x, (n, 2 * h, 2 * w, c), (1, 2), scale, (1 - scale) / 2, "linear", antialias=False
        )
        x = nn.Conv(self.features, (1, 1), name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm")(x))


class TextbookUNet(nn.Module):
    """Without dropout."""

    downsampling: str
    upsampling: str
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train=False):
        skips = []
        for i, width in enumerate(self.widths, 1):
            x = TextbookBlock(width, name=f"encoder{i}")(x, train)
            if i < len(self.widths):
                skips.append(x)
                if self.downsampling == "max_pool":
                    x = nn.max_pool(x, (2, 2), strides=(2, 2))
                else:
                    x = nn.Conv(width, (3, 3), strides=2, padding=1, name=f"down{i}")(x)
        for i in range(len(self.widths) - 1, 0, -1):
            x = TextbookUpsample(self.widths[i - 1], self.upsampling, name=f"up{i}")(x, train)
            x = TextbookBlock(self.widths[i - 1], name=f"decoder{i}")(jnp.concatenate([skips[i - 1], x], -1), train)
        x = nn.Conv(self.widths[0], (3, 3), padding=1, name="head")(x)
        return nn.Conv(3, (1, 1), name="logits")(x)


IMAGES = normal(2, 8, 12, 3)


def training(model: nn.Module):
    """Of (params, stats): the logits in training, the updated statistics, and the gradients of a sum of the logits."""
    weights = normal(2, 8, 12, 3, seed=1)

    def loss(params, stats):
        logits, updated = model.apply({"params": params, "batch_stats": stats}, IMAGES, True, mutable=["batch_stats"])
        return (logits * weights).sum(), (logits, updated["batch_stats"])

    def run(params, stats):
        (_, (logits, updated)), grads = jax.value_and_grad(loss, has_aux=True)(params, stats)
        return logits, updated, grads

    return jax.jit(run)


# These two have every layer; evaluation below is of all four, and of three levels.
@pytest.mark.parametrize(
    ("downsampling", "upsampling", "no_gradient"),
    [
        ("max_pool", "transposed_conv", set()),
        # The norm after the resize takes out what is constant: its convolution's bias, and that of the norm before.
        ("strided_conv", "resize", {"up1/conv/bias", "encoder2/norm2/bias"}),
    ],
)
def test_training_is_the_textbooks_and_every_parameter_learns(downsampling, upsampling, no_gradient):
    widths = WIDTHS[:2]
    model = UNet(downsampling, upsampling, widths, dropout_rate=0.0)
    params, stats = (variables(model)[name] for name in ("params", "batch_stats"))
    logits, updated, grads = training(model)(params, stats)
    expected = training(TextbookUNet(downsampling, upsampling, widths))(params, stats)
    chex.assert_trees_all_close(logits, expected[0], atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(updated, expected[1], atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected[2], atol=1e-4, rtol=1e-4)
    largest = {
        "/".join(entry.key for entry in path): float(np.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    assert {name for name, value in largest.items() if value < 1e-3} == no_gradient
    assert all(np.any(new != old) for new, old in zip(*map(jax.tree.leaves, (updated, stats)), strict=True))


@pytest.mark.parametrize(("downsampling", "upsampling"), [COMBINATIONS[0], COMBINATIONS[3]])
def test_forward_mode_and_gradients_of_gradients_are_the_textbooks(downsampling, upsampling):
    # In float64: in float32 a gradient of gradients differs by more than 1e-5 on some processors.
    widths, images = WIDTHS[:2], IMAGES.astype(np.float64)
    model = UNet(downsampling, upsampling, widths, dropout_rate=0.0, dtype=jnp.float64)
    values = jax.tree.map(np.float64, variables(UNet(downsampling, upsampling, widths, dropout_rate=0.0)))

    def derivatives(model):
        def logits(params, images):
            return model.apply({**values, "params": params}, images, True, mutable=["batch_stats"])[0]

        def of_images(params, images):
            return jax.grad(lambda images: jnp.square(logits(params, images)).sum())(images)

        def penalty(params):
            return jnp.square(of_images(params, images)).mean()

        @jax.jit
        def run(params):
            forward = jax.jvp(lambda images: logits(params, images), (images,), (images[::-1],))[1]
            over_reverse = jax.jvp(lambda images: of_images(params, images), (images,), (images[::-1],))[1]
            return forward, over_reverse, jax.grad(penalty)(params)

        return run(values["params"])

    with jax.enable_x64(True):
        ours, textbook = derivatives(model), derivatives(TextbookUNet(downsampling, upsampling, widths))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(textbook), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, atol=1e-11 * max(1.0, np.abs(other).max()), rtol=0)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(ours[:2]))


@functools.cache
def evaluation(model: nn.Module):
    return jax.jit(lambda variables: model.apply(variables, IMAGES))


@pytest.mark.parametrize(("downsampling", "upsampling"), COMBINATIONS)
def test_evaluation_is_the_textbooks(downsampling, upsampling):
    # With dropout, and no key for it: there is none in evaluation.
    model = UNet(downsampling, upsampling, WIDTHS)
    values = variables(model)
    logits = evaluation(model)(values)
    expected = evaluation(TextbookUNet(downsampling, upsampling, WIDTHS))(values)
    chex.assert_trees_all_close(logits, expected, atol=1e-5, rtol=1e-5)
    shifted = changed(values, "batch_stats/encoder1/norm1/mean", lambda mean: mean + 1)
    assert np.abs(evaluation(model)(shifted) - logits).max() > 1e-3


def test_every_skip_matters_and_comes_first():
    model = UNet(widths=WIDTHS)
    run, values = evaluation(model), variables(model)
    logits = run(values)
    for level in (1, 2):
        width = WIDTHS[level - 1]
        kernel = f"params/decoder{level}/conv1/kernel"
        without_skip = changed(values, kernel, lambda k: k * (np.arange(2 * width) >= width)[:, None])  # noqa: B023
        assert np.abs(run(without_skip) - logits).max() > 1e-2
    # Without what comes from below, nothing but the first encoder block reaches the logits.
    skip_alone = changed(values, "params/decoder1/conv1/kernel", lambda k: k * (np.arange(6) < 3)[:, None])
    logits = run(skip_alone)
    for below in ("encoder2/conv1", "encoder3/conv2", "up2/conv", "decoder2/conv1", "up1/conv"):
        np.testing.assert_array_equal(run(changed(skip_alone, f"params/{below}/kernel", np.negative)), logits)
    assert np.abs(run(changed(skip_alone, "params/encoder1/conv2/kernel", np.negative)) - logits).max() > 1e-2


# --- dropout


def test_dropout_is_in_the_two_deepest_encoder_blocks_alone():
    def blocks(rate):
        model = UNet(widths=WIDTHS, dropout_rate=rate)

        @jax.jit
        def run(variables, key):
            _, seen = model.apply(
                variables,
                IMAGES,
                True,
                rngs={"dropout": key},
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=lambda module, _: isinstance(module, DoubleConv),
            )
            return {name: block["__call__"][0] for name, block in seen["intermediates"].items()}

        return run

    values = variables(UNet(widths=WIDTHS))
    first, second = (jax.random.key(i, impl="unsafe_rbg") for i in (1, 2))  # quicker to compile than the default
    plain, dropped = blocks(0.0)(values, first), blocks(0.5)(values, first)
    assert set(plain) == {"encoder1", "encoder2", "encoder3", "decoder2", "decoder1"}
    zeros = {name: float(np.mean(np.asarray(block) == 0)) for name, block in dropped.items()}
    assert {name for name, part in zeros.items() if part > 0} == {"encoder2", "encoder3"}
    assert all(0.3 < zeros[name] < 0.7 for name in ("encoder2", "encoder3"))
    np.testing.assert_allclose(dropped["encoder1"], plain["encoder1"], atol=1e-6)
    # What is kept is scaled up by 1 / (1 - rate).
    kept = np.asarray(dropped["encoder2"]) != 0
    np.testing.assert_allclose(dropped["encoder2"][kept], 2 * plain["encoder2"][kept], rtol=1e-5)
    again, other = blocks(0.5)(values, first), blocks(0.5)(values, second)
    chex.assert_trees_all_equal(again, dropped)
    assert np.any((np.asarray(other["encoder2"]) == 0) == kept)


def test_dropout_without_a_key_is_an_error():
    model = UNet(widths=WIDTHS)
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda v: model.apply(v, IMAGES, True, mutable=["batch_stats"]), variable_shapes(model))


# --- dtypes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("downsampling", "upsampling"), [COMBINATIONS[0], COMBINATIONS[3]])
def test_a_training_step_never_promotes_silently(downsampling, upsampling, dtype):
    model = UNet(downsampling, upsampling, WIDTHS, dtype=dtype)
    labels, weights = np.zeros((2, 8, 12), np.uint8), np.ones(2, np.float32)
    sums = losses.make_loss("cross_entropy+0.5*log_dice+soft_dice")

    def loss(params, stats, images):
        logits, updated = model.apply(
            {"params": params, "batch_stats": stats},
            images,
            True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return sums(logits, labels, weights), (logits, updated, metrics.picture_sums(logits, labels, weights))

    shapes = variable_shapes(model)
    with jax.numpy_dtype_promotion("strict"):
        (value, (logits, updated, _)), grads = jax.eval_shape(
            jax.value_and_grad(loss, has_aux=True), shapes["params"], shapes["batch_stats"], IMAGES.astype(dtype)
        )
        evaluated = jax.eval_shape(model.apply, shapes, IMAGES.astype(dtype))
    assert value.dtype == logits.dtype == evaluated.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, shapes["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(updated["batch_stats"], shapes["batch_stats"])


def test_bfloat16_is_near_float32():
    wide, narrow = (UNet(widths=WIDTHS, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    expected, logits = (np.asarray(evaluation(model)(variables(wide))) for model in (wide, narrow))
    error = np.abs(logits - expected).max() / expected.std()
    assert 1e-4 < error < 0.15  # it is other arithmetic, and eight bits of it


def test_float64_stays_float64():
    with jax.enable_x64(True):
        model = UNet("strided_conv", "resize", WIDTHS, dtype=jnp.float64)
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 4, 4, 3))))
        assert jax.eval_shape(model.apply, shapes, np.zeros((1, 4, 4, 3))).dtype == jnp.float64


def test_a_method_that_the_network_does_not_have_is_refused():
    for methods in ({"downsampling": "maxpool"}, {"upsampling": "transpose"}):
        with pytest.raises(InputError, match=r"is no method of the network: choose from \w+, \w+\n"):
            UNet(**methods).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
