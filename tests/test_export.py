import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_predict import SIZE, make_run, picture

from unet_jax import device
from unet_jax.commands.export import command
from unet_jax.config import default_config
from unet_jax.errors import InputError
from unet_jax.predict import load

export = pytest.importorskip("unet_jax.export", exc_type=ImportError)
pytest.importorskip("flatbuffers")


def call(folder):
    """What model.json tells to do."""
    model = jax.export.deserialize(bytearray((folder / "model.jaxexport").read_bytes()))
    return jax.jit(model.call, compiler_options=device.compiler_options("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, and what is exported of it."""
    folder = tmp_path_factory.mktemp("export")
    export.export_run(make_run(folder / "run"), folder / "out")
    return folder / "run", folder / "out"


def check(run, out, sizes):
    predictor, exported = load(run), call(out)
    for count, height, width in sizes:
        images = np.stack([picture(height, width, seed) for seed in range(count)])
        expected = predictor.network(images)
        assert np.ptp(expected) > 0.3
        np.testing.assert_allclose(exported(images), expected, atol=1e-5)


def test_answers_are_the_checkpoints_at_any_size(folders):
    check(*folders, [(2, 32, 32), (1, 16, 48)])


@pytest.mark.parametrize("upsampling", ["transposed_conv", "resize"])
def test_answers_of_strided_networks_are_the_checkpoints(tmp_path, upsampling):
    run = make_run(tmp_path / "run", "strided_conv", upsampling)
    assert export.export_run(run, tmp_path / "out")["input"]["shape"] == ["n", "4*h", "4*w", 3]
    check(run, tmp_path / "out", [(3, 16, 48)])


def test_the_description_says_how_16_bit_greys_are_scaled():
    config = default_config("mp_tr_ce", "synthetic")
    for white, text in ((4095, ", 16-bit greys as min(value, 4095) * 255 // 4095"), (65535, ""), (None, "")):
        assert export.greys(replace(config, data=replace(config.data, white=white))) == text


def test_the_description(folders):
    artifact = (folders[1] / "model.jaxexport").read_bytes()
    description = json.loads((folders[1] / "model.json").read_text())
    assert description["artifact"]["sha256"] == hashlib.sha256(artifact).hexdigest()
    assert description["input"]["shape"] == ["n", "4*h", "4*w", 3]
    assert description["class_names"] == ["pet", "background", "border"]
    assert description["platforms"] == list(jax.export.deserialize(bytearray(artifact)).platforms)
    assert b"unet_jax/" not in artifact  # file names of the machine that it was made on


def test_jax_alone_can_call_it(folders, tmp_path):
    run, out = folders
    images = picture(48, 64)[None]
    np.save(tmp_path / "images.npy", images)
    script = [
        "import sys, numpy",
        f"images = numpy.load({str(tmp_path / 'images.npy')!r})",
        *json.loads((out / "model.json").read_text())["usage"],
        "assert 'xla_cpu' not in open('model.json').read().split('optional_on_cpu')[0]",
        "assert not {'flax', 'unet_jax', 'optax', 'orbax'} & set(sys.modules)",
        f"numpy.save({str(tmp_path / 'labels.npy')!r}, labels)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=out, check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), load(run).network(images).argmax(-1))


@pytest.mark.parametrize(
    ("downsampling", "upsampling", "widths"),
    [
        ("max_pool", "transposed_conv", (4, 8, 8)),
        ("strided_conv", "resize", (4, 8, 8)),
        ("max_pool", "transposed_conv", (32, 64, 128, 256, 512)),
    ],
)
def test_onnx_runtime_gives_the_answers_of_the_checkpoint(tmp_path, monkeypatch, downsampling, upsampling, widths):
    pytest.importorskip("jax2onnx")
    run, out = make_run(tmp_path / "run", downsampling, upsampling, widths), tmp_path / "out"
    description = export.export_run(run, out, "onnx")
    assert description["input"]["shape"] == ["n", SIZE, SIZE, 3]
    assert description["artifact"]["sha256"] == hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest()
    monkeypatch.chdir(out)
    for count in (1, 3):
        images = np.stack([picture(SIZE, SIZE, seed) for seed in range(count)])
        expected = load(run).network(images)
        assert np.ptp(expected) > 0.3
        names = {"images": images}
        exec("\n".join(description["usage"]), names)
        np.testing.assert_array_equal(names["labels"], expected.argmax(-1))
        np.testing.assert_allclose(names["session"].run(None, {"images": images})[0], expected, atol=1e-4)


def test_what_onnx_needs_is_told_in_a_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        command([str(folders[0]), "--out", str(tmp_path / "out"), "--format", "onnx"])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("error: this export needs jax2onnx: pip install 'unet-jax[onnx]'\n")
    assert not (tmp_path / "out").exists()


def test_bad_input(folders, tmp_path):
    run, _ = folders
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        export.export_run(run, tmp_path / "file")
    half = tmp_path / "half"
    half.mkdir()
    with pytest.raises(InputError, match="no run folder"):
        export.export_run(half, tmp_path / "out")
    (half / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(InputError, match="no complete checkpoint"):
        export.export_run(half, tmp_path / "out")
    assert not (tmp_path / "out").exists()
