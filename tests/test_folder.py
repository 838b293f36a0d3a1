"""Folders of one's own pictures: every kind of mask, every kind of mistake, and whole runs on them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_run import execute, records

from unet_jax.checks import check_config
from unet_jax.config import DataConfig, RunConfig, TrainConfig, default_config
from unet_jax.data.folder import fill_in, sources
from unet_jax.errors import InputError
from unet_jax.losses import cross_entropy, make_loss

RNG = np.random.default_rng(0)
COLOURS = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 255]], np.uint8)
ROTATED = 6  # the EXIF orientation of a camera held upright


def save(folder: Path, stem: str, mask: Image.Image | np.ndarray, picture: np.ndarray | None = None, **options) -> None:
    """A picture (of the mask's size if not given) and its mask."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    if picture is None:
        picture = RNG.integers(0, 256, (mask.height, mask.width, 3), np.uint8)
    Image.fromarray(picture).save(folder / "images" / f"{stem}.png", **options)
    mask.save(folder / "masks" / f"{stem}.png")


def labels(values: int = 3, shape: tuple[int, int] = (20, 24)) -> np.ndarray:
    """All values in turn."""
    return (np.arange(shape[0] * shape[1]) % values).astype(np.uint8).reshape(shape)


def config(folder: Path, names: tuple[str, ...] = (), fraction: float = 0.2, **fields) -> DataConfig:
    return DataConfig("folder", str(folder), class_names=names, test_fraction=fraction, **{"white": None, **fields})


def load(folder: Path, names: tuple[str, ...] = (), fraction: float = 0.2, seed: int = 0, **fields):
    """The class names, and all examples by their name, of what a run is trained on."""
    found = sources(fill_in(config(folder, names, fraction, **fields), seed), seed)
    examples = [source.read(i) for source in found.values() for i in range(source.size)]
    for example in examples:
        assert (example.image.dtype, example.labels.dtype) == (np.uint8, np.uint8)
        assert example.image.shape == (*example.labels.shape, 3)
    return found["train"].class_names, {example.name: example for example in examples}


def as_palette(values: np.ndarray, colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    return image


INDEX_MASKS = {
    "grey": Image.fromarray,
    "palette": lambda values: as_palette(values, COLOURS),
    "16 bit": lambda values: Image.fromarray(values.astype(np.uint16)),
    "grey as RGB": lambda values: Image.fromarray(np.stack([values] * 3, -1)),
    "grey with alpha": lambda values: Image.fromarray(np.stack([values, 255 - values], -1), "LA"),
}


@pytest.mark.parametrize("kind", INDEX_MASKS)
def test_index_masks(tmp_path, kind):
    truth = labels()
    for stem in "abcde":
        save(tmp_path, stem, INDEX_MASKS[kind](truth))
    names, examples = load(tmp_path)
    assert names == ("class_0", "class_1", "class_2")
    assert len(examples) == 5
    for example in examples.values():
        np.testing.assert_array_equal(example.labels, truth)
    assert load(tmp_path, ("x", "y", "z", "never"))[0] == ("x", "y", "z", "never")


def test_one_bit_masks(tmp_path):
    truth = labels(2)
    for stem in "ab":
        save(tmp_path, stem, Image.fromarray(truth.astype(bool)))
    names, examples = load(tmp_path)
    assert names == ("class_0", "class_1")
    np.testing.assert_array_equal(examples["a"].labels, truth)


@pytest.mark.parametrize("stored", ["RGB", "RGBA", "palette"])
def test_colour_masks(tmp_path, stored):
    (tmp_path / "classes.json").write_text(
        json.dumps({"names": ["sky", "road"], "colours": COLOURS[:2].tolist(), "ignore": [COLOURS[2].tolist()]})
    )
    truth = labels()
    mask = as_palette(2 - truth, COLOURS[::-1]) if stored == "palette" else Image.fromarray(COLOURS[truth])
    for stem in "ab":
        save(tmp_path, stem, mask.convert(stored) if stored == "RGBA" else mask)
    names, examples = load(tmp_path)
    assert names == ("sky", "road")
    np.testing.assert_array_equal(examples["b"].labels, np.where(truth == 2, 255, truth))


def test_masks_of_0_and_255_are_two_classes_and_a_line_says_so(tmp_path, capsys):
    truth = labels(2)
    save(tmp_path, "a", truth * 255)
    save(tmp_path, "b", truth * 0)
    names, examples = load(tmp_path)
    assert names == ("background", "foreground")
    np.testing.assert_array_equal(examples["a"].labels, truth)
    load(tmp_path)
    assert capsys.readouterr().out.count("hold 0 and 255 alone: taken as background (0) and foreground (255)") == 1
    assert load(tmp_path, ("no", "yes"))[0] == ("no", "yes")
    found = sources(config(tmp_path, ("u", "v", "w"), 0.5), 0)  # of three: ignored
    assert {found[k].read(0).name: set(found[k].read(0).labels.flat) for k in found} == {"a": {0, 255}, "b": {0}}


def test_255_is_ignored_where_there_are_other_values(tmp_path):
    truth = np.where(labels(4) == 3, 255, labels(4)).astype(np.uint8)
    save(tmp_path, "a", truth)
    save(tmp_path, "b", labels(2) * 255)
    names, examples = load(tmp_path)
    assert len(names) == 3
    np.testing.assert_array_equal(examples["a"].labels, truth)


def test_pictures_are_turned_upright_and_masks_lie_on_them(tmp_path):
    stored = RNG.integers(0, 256, (10, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = ROTATED
    for stem in "ab":
        save(tmp_path, stem, labels(shape=(30, 10)), stored, exif=exif)
    np.testing.assert_array_equal(load(tmp_path)[1]["a"].image, np.rot90(stored, -1))
    save(tmp_path, "b", labels(shape=(10, 30)), stored, exif=exif)
    with pytest.raises(InputError, match=r"size: 1 \(b: 30x10 for 10x30: is one turned by EXIF\?\)"):
        load(tmp_path)


def test_lists_make_the_splits_in_their_order(tmp_path):
    for i in range(6):
        save(tmp_path, f"p {i}", labels())
    (tmp_path / "train.txt").write_text("p 4\r\n\np 1\n")

    def split() -> dict[str, list[str]]:
        return {k: [s.read(i).name for i in range(s.size)] for k, s in sources(config(tmp_path), 0).items()}

    assert split()["train"] == ["p 4", "p 1"]
    assert sorted(split()["test"]) == ["p 0", "p 2", "p 3", "p 5"]
    (tmp_path / "test.txt").write_text("\ufeffp 0")
    (tmp_path / "masks" / "p 5.png").unlink()  # in no list: none of our business
    assert split() == {"train": ["p 4", "p 1"], "test": ["p 0"]}


def test_the_fraction_is_drawn_by_the_seed(tmp_path):
    for i in range(20):
        save(tmp_path, f"{i:02}", labels())

    def test_stems(fraction: float, seed: int) -> list[str]:
        found = sources(config(tmp_path, (), fraction), seed)
        train, test = ([found[k].read(i).name for i in range(found[k].size)] for k in ("train", "test"))
        assert sorted(train + test) == [f"{i:02}" for i in range(20)]
        return test

    assert test_stems(0.25, 0) == test_stems(0.25, 0)
    assert (len(test_stems(0.25, 0)), len(test_stems(0.001, 0)), len(test_stems(0.999, 0))) == (5, 1, 19)
    assert len({tuple(test_stems(0.25, seed)) for seed in range(5)}) > 1
    before = set(test_stems(0.25, 0))
    assert before == {"02", "03", "05", "14", "17"}  # the same on every machine
    save(tmp_path, "20", labels())
    found = sources(config(tmp_path, (), 0.25), 0)["test"]
    assert len(before - {found.read(i).name for i in range(found.size)}) <= 1


def test_the_cache_knows_a_changed_file(tmp_path):
    for stem in "ab":
        save(tmp_path, stem, labels())
    before = {k: dict(s.identity) for k, s in sources(config(tmp_path, (), 0.5), 0).items()}
    assert before == {k: dict(s.identity) for k, s in sources(config(tmp_path, ("u", "v", "w"), 0.5), 0).items()}
    json.dumps(before)
    save(tmp_path, "a", labels())
    after = {k: dict(s.identity) for k, s in sources(config(tmp_path, (), 0.5), 0).items()}
    assert sum(before[k] != after[k] for k in before) == 1


def broken_folder(folder: Path) -> None:
    """One of each mistake."""
    for stem in ("good", "narrow", "beyond", "cut", "colourful", "twice", "widow", "orphan", "fake"):
        save(folder, stem, labels())
    save(folder, "narrow", labels(shape=(20, 12)), np.zeros((20, 24, 3), np.uint8))
    save(folder, "beyond", labels(7))
    cut = folder / "images" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:200])
    save(folder, "colourful", Image.fromarray(COLOURS[labels()]))
    Image.new("RGB", (24, 20)).save(folder / "images" / "twice.jpg")
    (folder / "masks" / "widow.png").unlink()
    (folder / "images" / "orphan.png").unlink()
    Image.new("L", (24, 20)).save(folder / "masks" / "fake.png", "JPEG")


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    broken_folder(tmp_path)
    (tmp_path / "train.txt").write_text("good\nghost\ngood\n")
    with pytest.raises(InputError) as error:
        load(tmp_path, ("a", "b", "c"))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path} has ")
    for part in (
        "no picture in images/ for: 2 (ghost, orphan)",
        "no mask in masks/ for: 2 (ghost, widow)",
        "several files for: 1 (images/twice)",
        "stems listed twice: 1 (good)",
        "files that cannot be used: 2 (images/cut.png: ",
        "masks in colours, which need a classes.json that lists them: 1 (colourful)",
        '{"names": ["a", "b", "c", "class_3", ',
        "masks/fake.png: is no PNG",
        "masks that differ from their picture in size: 1 (narrow: 12x20 for 24x20)",
        "masks with values that are none of the 3 classes: 1 (beyond: 3, 4, 5, ...)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 128], r"classes, name them\): 2 \(0, 128\)"),
        ([1, 2, 3], r"classes, name them\): 3 \(1, 2, 3\)"),
        ([0], r"classes, name them\): 1 \(0\)"),
        (range(256), r"classes, name them\): 255 \(0, 1, 2, \.\.\.\)"),
        ([0, 1, 60000], r"classes, name them\): 3 \(0, 1, 60000\)"),
    ],
)
def test_values_that_do_not_count_classes(tmp_path, values, message):
    mask = np.resize(np.array(list(values), np.uint16), (20, 24))
    for stem in "ab":
        save(tmp_path, stem, mask if mask.max() > 255 else mask.astype(np.uint8))
    with pytest.raises(InputError, match=message):
        load(tmp_path)
    if mask.max() == 128:
        assert len(load(tmp_path, tuple(f"c{i}" for i in range(129)))[0]) == 129


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not of the form"),
        ("[]", "is not of the form"),
        ('{"colors": []}', "is not of the form"),
        ('{"names": ["a", 1]}', "is not of the form"),
        ('{"colours": [[0, 0, 256], [0, 0, 1]]}', "is not of the form"),
        ('{"names": ["a"]}', "must be two to 255"),
        ('{"names": ["a", "a"]}', "of different names"),
        ('{"names": ["a", "b"], "colours": [[0, 0, 0]]}', "1 colours for 2 classes"),
        ('{"names": ["a", "b"], "ignore": [[0, 0, 0]]}', "0 colours for 2 classes"),
        ('{"colours": [[0, 0, 0], [0, 0, 0]]}', "each must have its own"),
        ('{"colours": [[0, 0, 0], [10, 20, 30]]}', r"none of the 2 classes: 2 \(a: #0000ff, #c80000; |a: #0000ff"),
    ],
)
def test_bad_classes_json(tmp_path, content, message):
    for stem in "ab":
        save(tmp_path, stem, Image.fromarray(COLOURS[labels()]))
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_names_that_contradict_the_folder(tmp_path):
    (tmp_path / "classes.json").write_text('{"names": ["a", "b", "c"]}')
    for stem in "ab":
        save(tmp_path, stem, labels())
    assert load(tmp_path)[0] == ("a", "b", "c")
    with pytest.raises(InputError, match=r"to be c, b, a, but .* names a, b, c"):
        load(tmp_path, ("c", "b", "a"))


def test_folders_with_nothing_to_use(tmp_path):
    with pytest.raises(InputError, match="nowhere is to hold images/ and masks/: there is no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"to hold images/ and masks/: masks/ is missing, it holds images$"):
        load(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match=r"splits without pictures: 2 \(test, train\)"):
        load(tmp_path)
    save(tmp_path, "only", labels())
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "images" / name).write_text("")
    with pytest.raises(InputError, match=r"has splits without pictures \(--test-fraction 0 .* test\): 1 \(test\)$"):
        load(tmp_path)


def test_class_weights_are_a_weighted_mean():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    truth = np.array(RNG.integers(0, 3, (2, 4, 5)), np.uint8)
    truth[0, 0, :3] = 255
    weights = (1.0, 2.0, 0.5)
    log_p = np.asarray(jax.nn.log_softmax(logits), float)
    counted = truth != 255
    each = np.array(weights)[truth[counted]]
    losses = -log_p[counted][np.arange(counted.sum()), truth[counted]]
    expected = (each * losses).sum() / each.sum()
    value, gradient = jax.jit(jax.value_and_grad(make_loss("cross_entropy", weights)))(logits, truth, None)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert not np.asarray(gradient)[~counted].any()
    assert float(cross_entropy(logits, truth, class_weights=(3, 3, 3))) == pytest.approx(losses.mean(), rel=1e-6)
    # A weight of 0 is as good as ignoring the class, and padding counts nothing.
    without = np.where(truth == 2, 255, truth)
    assert float(cross_entropy(logits, truth, jnp.array([1.0, 0]), (1, 1, 0))) == pytest.approx(
        float(cross_entropy(logits[:1], without[:1])), rel=1e-6
    )
    doubled = make_loss("cross_entropy+cross_entropy", weights)(logits, truth, None)
    assert float(doubled) == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize("weights", [(1.0, -1.0, 1.0), (0.0, 1.0, 1.0), (float("nan"), 1.0, 1.0), (1.0, 2.0)])
def test_class_weights_that_no_run_can_have(weights):
    with pytest.raises(InputError, match="--class-weights are"):
        check_config(RunConfig(train=TrainConfig("cross_entropy", class_weights=weights)))
    with pytest.raises(InputError, match="log_dice lacks"):
        check_config(RunConfig(train=TrainConfig("log_dice", class_weights=(1.0, 1.0, 1.0))))


def test_defaults():
    run = default_config("mp_tr_dice", "folder")
    assert (run.data.image_size, run.data.class_names, run.train.batch_size) == (240, (), 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Where commands run, with a folder of bright squares (255) on dark ground (0) in it."""
    home = tmp_path_factory.mktemp("home")
    for i in range(15):
        mask = np.zeros((32 + i, 40), np.uint8)
        y, x = RNG.integers(0, 20, 2)
        mask[y : y + 12, x : x + 12] = 255
        noise = RNG.integers(0, 60, (*mask.shape, 3), np.uint8)
        save(home / "squares", f"square {i}", mask, noise + (mask // 2)[..., None])
    return home


RUN = ["--dataset", "folder", "--data-dir", "squares", "--image-size", "16", "--widths", "4", "4"]


def test_refused_in_one_line_and_nothing_written(home):
    flags = [*RUN, "--loss", "cross_entropy", "--class-weights", 1, 2, 3, "--workdir", "refused"]
    assert "are 3, the classes background, foreground" in execute(home, "run.py", *flags, status=2)
    assert "--dataset folder needs --data-dir" in execute(home, "run.py", "--dataset", "folder", status=2)
    assert not (home / "refused").exists()


def test_a_run_from_the_first_epoch_to_the_evaluation(home):
    flags = [*RUN, "--variant", "mp_tr_ce", "--class-weights", 1, 4, "--workdir", "run"]
    output = execute(home, "run.py", *flags, "--epochs", 1)
    assert output.count("taken as background (0) and foreground (255)") == 1
    kept = json.loads((home / "run" / "config.json").read_text())
    assert kept["data"]["class_names"] == ["background", "foreground"]
    assert (kept["train"]["batch_size"], kept["train"]["class_weights"]) == (12, [1, 4])  # 3 of 15 are the test
    assert "going on from step 1, after 1 epoch" in execute(home, "run.py", *flags, "--epochs", 2)
    assert "binary_iou" in records(home / "run")[-1]
    execute(home, "evaluate.py", "run")
    result = json.loads((home / "run" / "evaluation-test" / "evaluation.json").read_text())
    for key in ("test_loss", "test_cross_entropy", "mean_iou", "iou"):
        assert result[key] == records(home / "run")[-1][key]
    assert (result["pictures"], list(result["iou"])) == (3, ["background", "foreground"])
    # The folder's classes are part of the run: it is not gone on with where they have changed.
    (home / "squares" / "classes.json").write_text('{"names": ["ground", "square"]}')
    assert "data.class_names" in execute(home, "run.py", *flags, "--epochs", 3, status=2)
