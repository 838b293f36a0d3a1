import hashlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_predict import SIZE, make_run, picture

from unet_jax import device
from unet_jax.errors import InputError
from unet_jax.predict import load

export = pytest.importorskip("unet_jax.export", exc_type=ImportError)
pytest.importorskip("flatbuffers")


def call(folder):
    """What model.json tells to do."""
    model = jax.export.deserialize(bytearray((folder / export.ARTIFACT).read_bytes()))
    return jax.jit(model.call, compiler_options=device.compiler_options())


@pytest.mark.parametrize(
    ("downsampling", "upsampling", "sizes"),
    [
        ("max_pool", "transposed_conv", [(2, 32, 32), (1, 16, 48)]),
        ("strided_conv", "transposed_conv", [(1, 64, 16)]),
        ("max_pool", "resize", [(1, SIZE, SIZE), (3, SIZE, SIZE)]),
    ],
)
def test_answers_are_the_checkpoints(tmp_path, downsampling, upsampling, sizes):
    run = make_run(tmp_path / "run", downsampling, upsampling)
    description = export.export_run(run, tmp_path / "out")
    predictor, exported = load(run), call(tmp_path / "out")
    for count, height, width in sizes:
        images = np.stack([picture(height, width, seed) for seed in range(count)])
        expected = predictor.network(images)
        assert np.ptp(expected) > 0.3
        np.testing.assert_allclose(exported(images), expected, atol=1e-5)
    symbolic = ["n", "4*h", "4*w", 3] if upsampling == "transposed_conv" else ["n", SIZE, SIZE, 3]
    assert description["input"]["shape"] == symbolic


def test_the_description(tmp_path):
    run = make_run(tmp_path / "run")
    export.export_run(run, tmp_path / "out")
    artifact = (tmp_path / "out" / export.ARTIFACT).read_bytes()
    description = json.loads((tmp_path / "out" / "model.json").read_text())
    assert description["artifact"]["sha256"] == hashlib.sha256(artifact).hexdigest()
    assert description["class_names"] == ["pet", "background", "border"]
    assert description["platforms"] == list(jax.export.deserialize(bytearray(artifact)).platforms)
    assert str(tmp_path).encode() not in artifact
    assert b"unet_jax/" not in artifact  # file names of the machine that it was made on


def test_jax_alone_can_call_it(tmp_path):
    run = make_run(tmp_path / "run")
    description = export.export_run(run, tmp_path / "out")
    images = np.stack([picture(48, 64)])
    np.save(tmp_path / "images.npy", images)
    script = "\n".join(
        [
            "import sys, numpy",
            "images = numpy.load('../images.npy')",
            *description["usage"],
            "assert not {'flax', 'unet_jax', 'optax', 'orbax'} & set(sys.modules)",
            "numpy.save('../labels.npy', labels)",
        ]
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "out", check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), load(run).network(images).argmax(-1))


def test_bad_input(tmp_path):
    run = make_run(tmp_path / "run")
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
