"""An imported run is a run to evaluate, predict, export and --init-from; and what run.py and the import refuse."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from test_from_pytorch import make_state_dict, save_safetensors
from test_predict import picture

from unet_jax import device, export, predict, runs, train
from unet_jax.commands import evaluate as evaluate_command
from unet_jax.commands import import_torch
from unet_jax.commands import train as train_command
from unet_jax.errors import InputError
from unet_jax.from_pytorch import find_state_dict, variables_from_state_dict

WIDTHS, SIZE = (4, 6), 16


@pytest.fixture(scope="module")
def make_import():
    """What import_torch.py does once torch has read the file."""

    def make(folder, state_dict, variant="strconv_tr_ce", **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(import_torch, "read_state_dict", lambda path: state_dict)
            options = {"image_size": SIZE, "widths": WIDTHS, **options}
            import_torch.main(import_torch.Options(Path("theirs.pth"), variant, folder, **options))
        return folder

    return make


@pytest.fixture(scope="module")
def weights():
    """Of every kind of tensor that a strided network has, and small: the answers are no constants."""
    state_dict = make_state_dict("strided_conv", widths=WIDTHS)
    return {name: np.abs(a) if name.endswith("var") else a for name, a in state_dict.items()}


@pytest.fixture(scope="module")
def imported(tmp_path_factory, make_import, weights):
    return make_import(tmp_path_factory.mktemp("import") / "run", weights)


def test_it_answers_as_its_weights_do(imported, weights):
    predictor, image = predict.load(imported), picture(SIZE, SIZE)
    model = train.make_model(predictor.config.model, 3, predictor.placement)
    state = train.TrainState(step=0, opt_state=None, **variables_from_state_dict(weights, model))
    infer = jax.jit(train.infer, static_argnums=2, compiler_options=device.compiler_options("cpu"))
    expected = jax.nn.softmax(infer(state, image[None], model)[0])
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(predictor(image, probabilities=True), expected, atol=1e-6)


def test_evaluate_takes_it(imported, tmp_path, capsys):
    options = {"dataset": "synthetic", "examples": 5, "cache_dir": str(tmp_path), "out": tmp_path / "out"}
    evaluate_command.evaluate_run(evaluate_command.Options(imported, **options))
    assert f"{imported}, imported weights, 5 test pictures of synthetic" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (result["epoch"], np.sum(result["confusion"])) == (0, 5 * SIZE * SIZE)
    assert 0 < result["mean_iou"] < 1


def test_export_takes_it(imported, tmp_path):
    pytest.importorskip("flatbuffers")
    assert export.export_run(imported, tmp_path / "out")["step"] == 0
    model = jax.export.deserialize(bytearray((tmp_path / "out" / "model.jaxexport").read_bytes()))
    images = picture(2 * SIZE, SIZE)[None]
    answer = jax.jit(model.call, compiler_options=device.compiler_options("cpu"))(images)
    np.testing.assert_allclose(answer, predict.load(imported).network(images), atol=1e-5)


def train_on(workdir, *flags):
    data = ["--dataset", "synthetic", "--image-size", SIZE, "--train-examples", 8, "--test-examples", 4]
    options = [*data, "--epochs", 1, "--batch-size", 4, "--widths", *WIDTHS, "--cache-dir", workdir.parent / "cache"]
    (parsed,) = train_command.parse([*map(str, ["--variant", "strconv_tr_ce", *options, "--workdir", workdir, *flags])])
    train_command.train_run(parsed, device.placement())


def test_training_starts_from_it(imported, tmp_path):
    train_on(tmp_path / "run", "--init-from", imported, "--learning-rate", 1e-12)
    tuned, theirs = (runs.load(run, device.placement())[1].state for run in (tmp_path / "run", imported))
    assert (int(tuned.step), int(theirs.step)) == (2, 0)
    chex.assert_trees_all_close(tuned.params, theirs.params, atol=1e-6)


def test_training_does_not_overwrite_it(make_import, weights, tmp_path):
    make_import(tmp_path / "run", weights)
    with pytest.raises(InputError, match=r"another config \(.*train.init_from: theirs.pth -> None"):
        train_on(tmp_path / "run")
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["0"]


def test_what_is_refused_writes_nothing(make_import, tmp_path, weights):
    with pytest.raises(InputError, match="--upsampling transposed_conv"):
        make_import(tmp_path / "run", weights, "strconv_ups_dice")
    with pytest.raises(InputError, match="multiples of 2"):
        make_import(tmp_path / "run", weights, image_size=31)
    assert not (tmp_path / "run").exists()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        make_import(tmp_path, weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_classes_are_those_given(make_import, tmp_path):
    state_dict = make_state_dict(widths=WIDTHS, num_classes=2)
    run = make_import(tmp_path / "run", state_dict, "mp_tr_ce", class_names=("road", "car"))
    config, restored = runs.load(run, device.placement())
    assert config.data.class_names == ("road", "car")
    np.testing.assert_array_equal(restored.state.params["logits"]["bias"], np.float32(state_dict["conv5.bias"]))


def test_files_that_torch_saved(tmp_path):
    torch = pytest.importorskip("torch")
    path, read = tmp_path / "x.pth", import_torch.read_state_dict
    for saved in ({"a.weight": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}, {"a.weight": torch.ones(2)}):
        torch.save(saved, path)
        np.testing.assert_array_equal(read(path)["a.weight"], np.ones(2, np.float32))
    for saved, reason in (
        ({"model": {}}, "no state dict"),
        (torch.nn.Linear(1, 1), r"holds other objects than tensors \(torch.nn.modules.linear.Linear\)"),
        ([], "no state dict, but list"),
    ):
        torch.save(saved, path)
        with pytest.raises(InputError, match=reason):
            read(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="cannot be read"):
        read(path)


def test_an_import_of_the_variant_with_an_average_is_a_run_too(make_import, tmp_path):
    state_dict = make_state_dict(widths=WIDTHS)
    run = make_import(tmp_path / "run", state_dict, "best")
    config, restored = runs.load(run, device.placement())
    assert config.train.ema
    variables = variables_from_state_dict(state_dict, train.make_model(config.model, 3, device.placement()))
    chex.assert_trees_all_equal(train.variables(restored.state), variables)


@pytest.mark.parametrize(
    ("down", "up", "flags"),
    [
        ("max_pool", "resize", {"upsampling": "resize"}),
        ("strided_conv", "transposed_conv", {"downsampling": "strided_conv", "loss": "log_dice"}),
    ],
)
def test_networks_that_are_no_variant_are_imported_by_flags(make_import, tmp_path, down, up, flags):
    run = make_import(tmp_path / "run", make_state_dict(down, up, WIDTHS), "mp_tr_ce", **flags)
    config, _ = runs.load(run, device.placement())
    assert (config.model.downsampling, config.model.upsampling) == (down, up)
    assert config.train.loss == flags.get("loss", "cross_entropy")


PLAIN = {"cblock1.conv1.weight": np.ones(2), "conv5.bias": np.zeros(1)}
MOMENTS = {"state": {0: {"step": np.zeros(()), "exp_avg": np.zeros(2)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (PLAIN, []),
        ({"state_dict": PLAIN, "class_weight": np.ones(3)}, ["entry 'state_dict'"]),
        ({"model_state_dict": PLAIN, "optimizer": MOMENTS, "epoch": 3}, ["entry 'model_state_dict'"]),
        ({**PLAIN, "mask_values": [0, 255]}, ["no tensors are left out: mask_values"]),
        ({f"module.{name}": value for name, value in PLAIN.items()}, ["prefix 'module.'"]),
        (
            {"state_dict": {**{f"model.{n}": v for n, v in PLAIN.items()}, "criterion.weight": np.ones(3)}, "epoch": 1},
            ["entry 'state_dict'", "prefix 'model.'", "without that prefix: criterion.weight"],
        ),
        ({"a": {"b": {"net": PLAIN}}}, ["entry 'a.b.net'"]),
    ],
)
def test_the_state_dict_in_a_checkpoint_is_found(content, notes):
    found, told = find_state_dict(content)
    assert found == PLAIN
    assert len(told) == len(notes)
    assert all(note in line for note, line in zip(notes, told, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "optimizer": MOMENTS}, "holds no state dict, but epoch, optimizer: save"),
        ({"model": PLAIN, "ema": PLAIN}, r"holds 2 state dicts \(model, ema\): save the one that you mean"),
        ([PLAIN], "holds no state dict, but list"),
    ],
)
def test_what_holds_no_or_many_state_dicts_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        find_state_dict(content)


def test_a_pickled_model_is_refused_in_a_whole_line(tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError(
            "Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo those"
            " steps only if you trust the source\x1b[0m.\nUnsupported global: GLOBAL net.UNet was not an allowed global"
        )

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=load))
    path = tmp_path / "x.pth"
    path.write_bytes(b"PK whatever")
    with pytest.raises(InputError) as error:
        import_torch.read_state_dict(path)
    assert "holds other objects than tensors (net.UNet)" in str(error.value)
    assert str(error.value).endswith("save the weights alone by torch.save(network.state_dict(), 'weights.pth')")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_safetensors_are_read_whatever_their_name(tmp_path, capsys, name):
    values = np.array([[1.5, -2.0, 0.25]], np.float32)
    half = (values.view(np.uint32) >> 16).astype(np.uint16)
    arrays = {"a.cblock1.conv1.weight": ("F32", values), "a.b": ("BF16", half), "a.c": ("F16", values.astype("f2"))}
    save_safetensors(tmp_path / name, arrays)
    found = import_torch.read_state_dict(tmp_path / name)
    assert set(found) == {"cblock1.conv1.weight", "b", "c"}
    for array in found.values():
        np.testing.assert_array_equal(array, values)
    assert "names without their prefix 'a.'" in capsys.readouterr().out
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5])
    with pytest.raises(InputError, match="is damaged"):
        import_torch.read_state_dict(tmp_path / name)
