"""Names, shapes and messages, on state dicts made without PyTorch; experiments/parity.py compares what is computed."""

import json

import jax
import numpy as np
import pytest

from unet_jax.errors import InputError
from unet_jax.from_pytorch import variables_from_state_dict
from unet_jax.model import UNet

VARIANTS = [(down, up) for down in ("max_pool", "strided_conv") for up in ("transposed_conv", "resize")]


def make_state_dict(down="max_pool", up="transposed_conv", widths=(4, 6, 8), num_classes=3, channels=3):
    """What PyTorch would save, with values that differ everywhere."""
    shapes, levels = {}, len(widths)

    def conv(name, out_features, in_features, size=3):
        shapes[f"{name}.weight"] = (out_features, in_features, size, size)
        shapes[f"{name}.bias"] = (out_features,)

    def norm(name, features):
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{tensor}"] = (features,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def block(name, in_features, width):
        for i, features in ((1, in_features), (2, width)):
            conv(f"{name}.conv{i}", width, features)
            norm(f"{name}.bn{i}", width)

    for i, width in enumerate(widths):
        block(f"cblock{i + 1}", widths[i - 1] if i else channels, width)
        if down == "strided_conv":
            conv(f"cblock{i + 1}.transition_layer", width, width)
    for i in range(levels - 1):
        name, width, below = f"ublock{levels + 1 + i}", widths[-2 - i], widths[-1 - i]
        if up == "resize":
            conv(f"{name}.transition_layer.1", width, below, 1)
            norm(f"{name}.transition_layer.2", width)
        else:
            shapes[f"{name}.transition_layer.weight"] = (below, width, 3, 3)  # a transposed conv: in, out
            shapes[f"{name}.transition_layer.bias"] = (width,)
        block(name, 2 * width, width)
    conv(f"conv{2 * levels}", widths[0], widths[0])
    conv(f"conv{2 * levels + 1}", num_classes, widths[0], 1)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def save_safetensors(path, arrays):
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, array) in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    head = json.dumps(entries).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def make_model(down="max_pool", up="transposed_conv", widths=(4, 6, 8), **kwargs):
    return UNet(down, up, widths, **kwargs)


def message(state_dict, model):
    with pytest.raises(InputError) as info:
        variables_from_state_dict(state_dict, model)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(("down", "up"), VARIANTS)
def test_names_and_shapes_are_those_of_init(down, up):
    widths = (2, 3, 4, 5, 6)
    model = make_model(down, up, widths, num_classes=5)
    variables = variables_from_state_dict(make_state_dict(down, up, widths, num_classes=5), model)
    expected = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )


def test_tensors_go_to_their_places():
    state_dict = make_state_dict("strided_conv", "resize")
    variables = variables_from_state_dict(state_dict, make_model("strided_conv", "resize"))
    params, batch_stats = variables["params"], variables["batch_stats"]
    places = {
        "cblock3.conv1.bias": params["encoder3"]["conv1"]["bias"],
        "cblock1.bn2.weight": params["encoder1"]["norm2"]["scale"],
        "cblock1.bn2.running_var": batch_stats["encoder1"]["norm2"]["var"],
        "cblock2.transition_layer.bias": params["down2"]["bias"],
        "ublock4.transition_layer.1.bias": params["up2"]["conv"]["bias"],
        "ublock4.transition_layer.2.running_mean": batch_stats["up2"]["norm"]["mean"],
        "ublock5.conv2.bias": params["decoder1"]["conv2"]["bias"],
        "conv6.bias": params["head"]["bias"],
        "conv7.bias": params["logits"]["bias"],
    }
    for name, found in places.items():
        np.testing.assert_array_equal(found, state_dict[name].astype(np.float32), err_msg=name)


def test_kernels_are_permuted():
    state_dict = make_state_dict()
    params = variables_from_state_dict(state_dict, make_model())["params"]
    weight, kernel = state_dict["cblock2.conv1.weight"].astype(np.float32), params["encoder2"]["conv1"]["kernel"]
    assert kernel[0, 2, 3, 5] == weight[5, 3, 0, 2]
    # [I, O, h, w] to [h, w, O, I], not flipped
    weight, kernel = state_dict["ublock4.transition_layer.weight"].astype(np.float32), params["up2"]["conv"]["kernel"]
    assert kernel[0, 2, 5, 7] == weight[7, 5, 0, 2]


def test_values_are_copies():
    state_dict = {name: array.astype(np.float32) for name, array in make_state_dict().items()}
    variables = variables_from_state_dict(state_dict, make_model())
    assert not any(np.shares_memory(leaf, a) for leaf in jax.tree.leaves(variables) for a in state_dict.values())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefix_is_stripped(prefix):
    state_dict = make_state_dict()
    plain = variables_from_state_dict(state_dict, make_model())
    prefixed = variables_from_state_dict({prefix + name: array for name, array in state_dict.items()}, make_model())
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, plain, prefixed)))


def test_unused_transition_layer_may_be_there_or_not():
    state_dict, model = make_state_dict("strided_conv"), make_model("strided_conv")
    assert "cblock3.transition_layer.weight" in state_dict
    variables_from_state_dict(state_dict, model)
    variables_from_state_dict({k: v for k, v in state_dict.items() if "cblock3.transition" not in k}, model)


def test_missing_and_unexpected_names_are_listed():
    state_dict = make_state_dict()
    del state_dict["cblock1.bn1.running_mean"], state_dict["conv6.bias"]
    state_dict |= {f"extra{i}.weight": np.zeros(1) for i in range(5)}
    text = message(state_dict, make_model())
    assert "2 missing (" in text
    assert "cblock1.bn1.running_mean" in text
    assert "conv6.bias" in text
    assert "5 unexpected (extra0.weight, extra1.weight, extra2.weight, ...)" in text
    assert "looks like" not in text


def test_weights_of_grey_pictures_are_refused():
    assert "1 of another shape (cblock1.conv1.weight (4, 1, 3, 3) instead of (4, 3, 3, 3))" in message(
        make_state_dict(channels=1), make_model()
    )


def test_wrong_shapes_are_listed_in_pytorchs_order():
    state_dict = make_state_dict()
    state_dict["cblock2.conv1.weight"] = np.zeros((6, 5, 3, 3))
    assert "1 of another shape (cblock2.conv1.weight (6, 5, 3, 3) instead of (6, 4, 3, 3))" in message(
        state_dict, make_model()
    )


@pytest.mark.parametrize(("down", "up"), [variant for variant in VARIANTS if variant != ("max_pool", "resize")])
def test_another_variant_is_named(down, up):
    text = message(make_state_dict(down, up), make_model("max_pool", "resize"))
    assert ("--downsampling strided_conv" in text) == (down == "strided_conv")
    assert ("--upsampling transposed_conv" in text) == (up == "transposed_conv")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_named(value):
    state_dict = make_state_dict()
    state_dict["conv6.bias"] = np.full_like(state_dict["conv6.bias"], value)
    assert "1 not finite (conv6.bias)" in message(state_dict, make_model())


def test_other_widths_and_classes_are_named():
    text = message(make_state_dict(widths=(4, 8), num_classes=2), make_model())
    assert text.endswith("it looks like a network of --widths 4 8, 2 --class-names")


def test_what_is_no_state_dict_is_refused():
    checkpoint = {"model": make_state_dict(), "epoch": 3}
    assert "2 unexpected (model, epoch); pass the network's own state dict" in message(checkpoint, make_model())
    assert "missing" in message({}, make_model())
