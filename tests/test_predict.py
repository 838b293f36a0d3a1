import dataclasses
import io
import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unet_jax import checkpoint, device, predict, runs, train
from unet_jax.commands import evaluate
from unet_jax.commands import predict as script
from unet_jax.config import DataConfig, ModelConfig, default_config, to_dict
from unet_jax.data import pictures, synthetic
from unet_jax.data.pictures import read_picture
from unet_jax.errors import InputError
from unet_jax.export import export_run
from unet_jax.plots import palette

SCRIPT = Path(__file__).parent.parent / "experiments" / "predict.py"
SIZE = 32


def make_run(folder, downsampling="max_pool", upsampling="transposed_conv", widths=(4, 8, 8)):
    """A run folder that nobody trained; its kernels are large, so that every input matters to the answer."""
    config = default_config("mp_tr_dice", "synthetic")
    model = ModelConfig(downsampling, upsampling, widths=widths)
    config = dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, image_size=SIZE))
    rng = np.random.default_rng(0)

    def weights(x):
        if x.ndim < 4:
            return np.ones(x.shape, x.dtype)
        return rng.uniform(-2.5, 2.5, x.shape).astype(x.dtype) / np.sqrt(np.prod(x.shape[:3]), dtype=x.dtype)

    state = jax.tree.map(weights, runs.fresh_state(config, device.placement()))
    folder.mkdir()
    runs.write_json(folder / "config.json", to_dict(config))
    with checkpoint.manager(folder / "checkpoints", 0) as checkpoints:
        checkpoint.save(checkpoints, state, checkpoint.Progress([], []))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture(scope="module")
def predictor(run):
    return predict.load(run, tile_size=128)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 96 pixels, of which 32 on each side have no say, on pictures filled up to multiples of 32."""
    monkeypatch.setattr(predict, "UNIT", 32)
    return 96


def picture(height, width, seed=0):
    """Blobs of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (17, 333), (500, 375), (32, 32), (129, 2)])
@pytest.mark.parametrize("mode", ["resize", "tile"])
def test_any_size(run, predictor, size, mode):
    predictor = predict.load(run, 256) if size == (500, 375) else predictor  # fewer tiles
    labels = predictor(picture(*size), mode)
    assert (labels.shape, labels.dtype) == (size, np.uint8)
    probabilities = predictor(picture(*size), mode, probabilities=True)
    assert (probabilities.shape, probabilities.dtype) == ((*size, 3), np.float32)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(-1), labels)


def test_a_list_is_its_pictures_one_by_one(predictor):
    pictures = [picture(20 + 3 * i, 50, seed=i) for i in range(20)]  # more than a batch
    for labels, image in zip(predictor(pictures), pictures, strict=True):
        np.testing.assert_array_equal(labels, predictor(image))
    assert predictor([]) == []


def test_what_a_notebook_shows_is_short(run):
    code = f"import unet_jax; print(len(repr(unet_jax.load({str(run)!r}))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "absl" not in done.stderr  # orbax warns that what is read is not to be written
    assert int(done.stdout) < 2000


def test_at_the_training_size_nothing_is_resized(predictor):
    image = picture(SIZE, SIZE)
    model = train.make_model(predictor.config.model, 3, predictor.placement)
    infer = jax.jit(
        train.infer, static_argnums=2, compiler_options=device.compiler_options("cpu")
    )  # rounding is theirs
    logits = infer(predictor.restored.state, image[None], model)[0]
    np.testing.assert_allclose(predictor(image, probabilities=True), jax.nn.softmax(logits), atol=1e-6)


def test_bands_are_one_resize():
    probabilities = np.random.default_rng(0).random((SIZE, SIZE, 3), np.float32)
    bands = list(predict.grow(probabilities, 1300, 2100))
    assert len(bands) > 1
    whole = Image.fromarray(np.ascontiguousarray(probabilities[:, :, 1])).resize(
        (2100, 1300), Image.Resampling.BILINEAR
    )
    np.testing.assert_allclose(np.concatenate(bands)[:, :, 1], np.asarray(whole), atol=1e-5)


@pytest.mark.parametrize(("downsampling", "tta"), [("max_pool", "all"), ("strided_conv", "none")])
def test_tiles_are_the_whole_picture(tmp_path, small_tiles, downsampling, tta):
    predictor = predict.load(make_run(tmp_path / "run", downsampling), small_tiles)
    image = picture(128, 128)
    whole = predictor.network(image[None], tta)[0]
    assert np.ptp(whole) > 0.3
    np.testing.assert_allclose(predictor(image, "tile", tta, probabilities=True), whole, atol=1e-5)
    # Whatever lies right of or below the picture is a reflection of it.
    filled = np.pad(image[:121, :100], ((0, 7), (0, 28), (0, 0)), mode="symmetric")
    whole = predictor.network(filled[None], tta)[0, :121, :100]
    np.testing.assert_allclose(predictor(image[:121, :100], "tile", tta, probabilities=True), whole, atol=1e-5)


def test_tile_mode_shows_pictures_at_the_scale_of_training(run, small_tiles):
    native = predict.load(run, small_tiles)
    data = dataclasses.replace(native.config.data, scale=(0.5, 0.25))
    predictor = dataclasses.replace(native, config=dataclasses.replace(native.config, data=data))
    image = picture(160, 256)
    small = np.asarray(Image.fromarray(image).resize((64, 80), Image.Resampling.BILINEAR))
    expected = predict.assemble(predict.grow(native(small, "native", probabilities=True), 160, 256), True)
    np.testing.assert_allclose(predictor(image, "tile", probabilities=True), expected, atol=1e-6)
    labels = predictor(image, "native")
    np.testing.assert_array_equal(labels, native(image, "native"))
    np.testing.assert_array_equal(labels, native(image, "tile"))  # of a run that knows no scale
    assert (labels != predictor(image, "tile")).any()


def test_tile_mode_says_at_which_scale():
    assert "at the scale of training, 0.50 of their height and 0.25 of their width" in script.scale_line((0.5, 0.25))
    assert "does not say at which scale" in script.scale_line(None)


def test_a_narrower_margin_would_not_do(run, small_tiles, monkeypatch):
    image, predictor = picture(128, 128), predict.load(run, small_tiles)
    whole = predictor.network(image[None])[0]
    monkeypatch.setattr(predict, "margin_of", lambda levels: 16)
    assert np.abs(predictor(image, "tile", probabilities=True) - whole).max() > 1e-3


def test_aligned_corner_tiles_are_nearly_the_whole_picture(tmp_path, small_tiles):
    predictor = predict.load(make_run(tmp_path / "run", upsampling="resize"), small_tiles)
    image = picture(128, 128)
    whole = predictor.network(image[None])[0].argmax(-1)
    assert (predictor(image, "tile") != whole).mean() < 0.05


@pytest.mark.parametrize(
    ("size", "tile", "margin"),
    [(128, 128, 32), (64, 128, 32), (256, 128, 32), (4096, 512, 32), (1152, 128, 32), (640, 2048, 256)],
)
def test_window_weights(size, tile, margin):
    windows, total = predict.windows(size, tile, margin), np.zeros(size)
    for origin, weights in windows:
        total[origin : origin + len(weights)] += weights
        assert origin % 16 == 0
        assert origin == 0 or not weights[:margin].any()
        assert origin + len(weights) == size or not weights[-margin:].any()
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize(("mode", "tta"), [("resize", "horizontal"), ("resize", "all"), ("tile", "all")])
def test_tta_commutes_with_the_flips_that_it_averages(predictor, mode, tta):
    image = picture(128, 256)
    averaged = predictor(image, mode, tta=tta, probabilities=True)
    flipped = predictor(image[:, ::-1], mode, tta=tta, probabilities=True)
    np.testing.assert_allclose(flipped[:, ::-1], averaged, atol=1e-5)
    upside_down = predictor(image[::-1], mode, tta=tta, probabilities=True)
    assert np.allclose(upside_down[::-1], averaged, atol=1e-5) == (tta == "all")
    assert np.abs(averaged - predictor(image, mode, probabilities=True)).max() > 1e-3


def test_tta_is_the_mean_over_the_picture_and_its_mirror_image(predictor):
    image = picture(SIZE, SIZE)
    views = [predictor(view, probabilities=True) for view in (image, image[:, ::-1])]
    expected = (views[0] + views[1][:, ::-1]) / 2
    np.testing.assert_allclose(predictor(image, tta="horizontal", probabilities=True), expected, atol=1e-6)


def test_evaluate_averages_as_predict_does(run, predictor, capsys):
    evaluate.command([str(run), "--tta", "--examples", "8"])
    output = capsys.readouterr().out
    assert "synthetic, --tta horizontal\n" in output
    assert ", --tta horizontal; files in " in output.splitlines()[-1]
    result = json.loads((run / "evaluation-test-horizontal" / "evaluation.json").read_text())
    assert result["tta"] == "horizontal"
    examples = [*map(synthetic.source("test", 8, SIZE).read, range(8))]
    probabilities = np.stack(predictor([e.image for e in examples], tta="horizontal", probabilities=True))
    labels = np.stack([e.labels for e in examples])
    assert result["pixel_accuracy"] == pytest.approx(np.mean(probabilities.argmax(-1) == labels), abs=1e-4)
    of_labels = np.take_along_axis(probabilities, labels[..., None].astype(int), -1)
    assert result["test_cross_entropy"] == pytest.approx(-np.log(of_labels).mean(), rel=1e-4)


def test_a_bare_tta_flag_is_horizontal():
    for given, meant in (
        (["run", "x.png", "--tta", "--out", "o"], ["run", "x.png", "--tta", "horizontal", "--out", "o"]),
        (["run", "--tta", "x.png"], ["run", "--tta", "horizontal", "x.png"]),
        (["--tta", "all", "--tta"], ["--tta", "all", "--tta", "horizontal"]),
        (["--tta", "none"], ["--tta", "none"]),
    ):
        assert script.with_tta_named(given) == meant


def test_a_path_is_read_as_training_reads_it(predictor, tmp_path):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # a phone that is held upright
    pixels.save(tmp_path / "phone.png", exif=turned)
    upright = np.asarray(pixels.transpose(Image.Transpose.ROTATE_270))
    expected = predictor(upright, probabilities=True)
    path = tmp_path / "phone.png"
    np.testing.assert_array_equal(predictor(str(path), probabilities=True), expected)
    np.testing.assert_array_equal(predictor([path, upright], probabilities=True)[0], expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(predictor(opened, probabilities=True), expected)
    with pytest.raises(InputError, match=r"nowhere.png: No such file or directory$"):
        predictor(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 3)),
        np.zeros((0, 8, 3), np.uint8),
        [np.zeros((8, 8, 4), np.uint8)],
        [[np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]],
        [None],
    ],
)
def test_what_is_no_picture(predictor, bad):
    with pytest.raises(InputError, match="pictures are uint8 arrays"):
        predictor(bad)


def test_an_array_without_colours_is_named_whole(predictor):
    with pytest.raises(InputError, match=r"picture 0 is uint8 of shape \(50, 60\): pictures are"):
        predictor(np.zeros((50, 60), np.uint8))


def test_greys_of_pillow_are_read_as_a_file_is(predictor, tmp_path):
    grey = Image.fromarray(picture(40, 56)).convert("L")
    grey.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(predictor(grey), predictor(tmp_path / "grey.png"))


@pytest.mark.parametrize("kind", [jnp.asarray, Image.fromarray])
def test_pictures_of_other_libraries_are_arrays(predictor, kind):
    image = picture(40, 56)
    expected = predictor(image)
    np.testing.assert_array_equal(predictor(kind(image)), expected)
    np.testing.assert_array_equal(predictor([kind(image)])[0], expected)


def test_bad_arguments(run, tmp_path, predictor):
    with pytest.raises(InputError, match="unknown mode"):
        predictor(picture(8, 8), "tiles")
    with pytest.raises(InputError, match="unknown tta True: choose from none, horizontal, all"):
        predictor(picture(8, 8), tta=True)
    for bad in (3, None):
        with pytest.raises(InputError, match="is no picture: pictures are uint8 arrays"):
            predictor(bad)
    assert predict.load(run, tile_size=np.int64(256)).tile_size == 256
    for bad in (0, 100, 512.0):
        with pytest.raises(InputError, match="multiple of 128"):
            predict.load(run, tile_size=bad)
    with pytest.raises(InputError, match="unknown format 'tflite': choose from jax, onnx, weights"):
        export_run(str(run), str(tmp_path / "export"), "tflite")
    with pytest.raises(InputError, match="no run folder"):
        predict.load(tmp_path)
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(InputError, match="no complete checkpoint"):
        predict.load(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "turned", "transparent"])
def test_kinds_of_pictures(tmp_path, mode):
    grey = np.zeros((6, 4), np.uint8)
    grey[:3] = 255  # white above black
    path, image = tmp_path / "a.png", Image.fromarray(grey)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    if mode == "CMYK":
        path = tmp_path / "a.tif"
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        image.save(path, exif=exif)
        expected = np.rot90(expected, -1)
    elif mode == "transparent":
        image = image.convert("RGBA")
        image.putalpha(0)
        expected = np.full_like(expected, 255)
    else:
        image = image.convert(mode)
    if mode != "turned":
        image.save(path)
    np.testing.assert_array_equal(read_picture(path), expected)


def test_unreadable_pictures(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(picture(40, 40)).save(path)
    data = path.read_bytes()
    for content, reason in (
        (b"", "is empty"),
        (b"hello", "no picture"),
        (data[:900], "truncated"),
        (None, "No such file"),
    ):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(InputError, match=f"{path.name}: .*{reason}"):
            read_picture(path)
    path.write_bytes(data)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match=r"40x40 pixels"):
        read_picture(path)


def test_mutated_pictures_are_read_or_refused(tmp_path):
    rng, bases, refused = random.Random(0), [], []
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        file = io.BytesIO()
        Image.fromarray(picture(40, 50)).save(file, kind)
        bases.append(file.getvalue())
    for i in range(42):
        data = bytearray(bases[i % len(bases)])
        if i % 3 == 0:
            for _ in range(rng.choice((1, 10, 100))):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif i % 3 == 1:
            del data[rng.randrange(len(data)) :]
        else:
            data[:16] = rng.choice(bases)[:16]
        path = tmp_path / "a"
        path.write_bytes(data)
        try:
            image = read_picture(path)
            assert (image.ndim, image.dtype) == (3, np.uint8)
        except InputError as error:
            refused.append(str(error))
    assert 10 < len(refused) < 42
    assert not any("\n" in line for line in refused)


def command(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=120)


def test_command(run, tmp_path):
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture(40, 60, seed)).save(tmp_path / folder / "x.png")
    (tmp_path / "a" / "notes.txt").write_text("no picture, and not named")
    (tmp_path / "a" / "bad.jpg").write_bytes(b"hello")
    out = tmp_path / "out"
    result = command(run, tmp_path / "a", tmp_path / "*" / "x.png", "nowhere", "--out", out, "--probabilities")
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("left out")]
    assert [line.split(": ")[-1] for line in lines] == ["there is no such file", "is no picture of a known format"]
    assert result.stdout.startswith("2 pictures in ")
    names = ["a-x", "b-x"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{name}_{end}" for name in names for end in ("mask.png", "overlay.png", "probabilities.npz")
    )
    predictor = predict.load(run)
    for name, seed in zip(names, (0, 1), strict=True):
        with Image.open(out / f"{name}_mask.png") as mask, np.load(out / f"{name}_probabilities.npz") as file:
            assert (mask.mode, mask.getpalette()[:9]) == ("P", palette(3).flatten().tolist())
            np.testing.assert_array_equal(np.asarray(mask), predictor(picture(40, 60, seed)))
            np.testing.assert_array_equal(file["probabilities"].argmax(-1), np.asarray(mask))
        with Image.open(out / f"{name}_overlay.png") as overlay:
            assert overlay.size == (60, 40)


def test_command_refuses(run, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "set_up", lambda folder: None)  # the tests have their own
    (tmp_path / "empty").mkdir()
    Image.fromarray(picture(8, 8)).save(tmp_path / "x.png")
    Image.fromarray(picture(8, 8)).save(tmp_path / "x_mask.png")
    out = tmp_path / "x.png"
    pictures, bad = script.find([str(tmp_path / "empty"), "x" * 300])
    assert (pictures, len(bad)) == ([], 2)
    with pytest.raises(InputError, match="has no pictures"):
        script.main(script.Options(run, (str(tmp_path / "empty"),), out))
    with pytest.raises(InputError, match="cannot be written"):
        script.main(script.Options(run, (str(tmp_path / "x.png"),), out))
    for patterns in (str(tmp_path), str(tmp_path / "x.png")):
        with pytest.raises(InputError, match="holds the pictures themselves"):
            script.main(script.Options(run, (patterns,), tmp_path))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "y.png").symlink_to(tmp_path / "x.png")
    for held in (tmp_path / "links", tmp_path):
        with pytest.raises(InputError, match="holds the pictures themselves"):
            script.main(script.Options(run, (str(tmp_path / "links"),), held))
    for size in (float("inf"), float("nan"), -1.0):
        with pytest.raises(InputError, match=f"--max-megapixels is {size}: it must be above 0"):
            script.main(script.Options(run, (str(tmp_path / "x.png"),), tmp_path / "out", max_megapixels=size))
    (tmp_path / "bad.png").write_bytes(b"")
    assert script.main(script.Options(run, (str(tmp_path / "bad.png"),), tmp_path / "out")) == 2


def test_what_a_folder_holds_besides_is_told(tmp_path, capsys):
    for name in ("a.png", "b.heic", "c.HEIC", "d.jp2", "e"):
        Image.fromarray(picture(8, 8)).save(tmp_path / name, "PNG")
    (tmp_path / "more").mkdir()
    assert script.find([str(tmp_path)]) == ([tmp_path / "a.png"], [])
    others = "2 .heic, 1 .jp2, 1 without an ending, 1 folder"
    assert f"which is left out: {others}\n" in capsys.readouterr().err
    (tmp_path / "a.png").unlink()
    assert script.find([str(tmp_path)]) == ([], [f"{tmp_path}: the folder has no pictures of known formats ({others})"])


@pytest.mark.parametrize(("of_run", "given", "expected"), [(4095, None, 255), (65535, 4095, 255), (65535, None, 15)])
def test_16_bits_are_read_as_the_run_read_them(tmp_path, capsys, predictor, of_run, given, expected):
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "a.png")
    data = dataclasses.replace(predictor.config.data, white=of_run)
    same = dataclasses.replace(predictor, config=dataclasses.replace(predictor.config, data=data))
    options = script.Options(tmp_path, (), tmp_path, white=given)
    _, image, _ = script.read(tmp_path / "a.png", "a", options, same)
    assert (image == expected).all()
    assert ("--white 4095 suits them" in capsys.readouterr().err) == (expected == 15)


def test_names_are_each_their_own():
    paths = [Path(p) for p in ("/a/x.png", "/b/X.png", "/a/x.jpg", "/a/y.png", "/c/a-x.png")]
    assert script.name_outputs(paths) == ["a-x", "b-X", "a-x-2", "y", "a-x-3"]
    long = script.name_outputs([Path("ä" * 120 + ".png"), Path("ä" * 121 + ".png")])
    assert long == ["ä" * 100, "ä" * 100 + "-2"]  # with its endings a name has 255 bytes at most


@pytest.mark.parametrize("kind", ["mask.png", "overlay.png", "probabilities.npz"])
def test_what_is_cut_off_leaves_the_file_before(tmp_path, monkeypatch, kind):
    path = tmp_path / f"x_{kind}"
    path.write_text("before")

    def cut_off(file, *args, **kwargs):
        file.write(b"half")
        raise KeyboardInterrupt

    if kind == "probabilities.npz":
        monkeypatch.setattr(np, "savez", cut_off)
    else:
        save = Image.Image.save
        of_kind = {"mask.png": "P", "overlay.png": "RGB"}[kind]
        monkeypatch.setattr(
            Image.Image,
            "save",
            lambda self, *a, **k: (cut_off if self.mode == of_kind else partial(save, self))(*a, **k),
        )
    options = script.Options(tmp_path, (), tmp_path, mode="tile", probabilities=True)
    with pytest.raises(KeyboardInterrupt):
        script.write("x", picture(8, 8), np.zeros((8, 8, 3), np.float32), options, DataConfig())
    assert path.read_text() == "before"
    assert not list(tmp_path.glob(".*"))
