"""Folders as tools leave them: each layout is told, read, trained on and predicted; others are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folder import as_palette, execute, labels, load
from test_splits import evaluate, refusal, split_of, train

from unet_jax import device, plots
from unet_jax.commands import predict

BORDER = (224, 224, 192)
# As CVAT writes it; background and border are known without being listed.
LABELMAP = "# label:color_rgb:parts:actions\ncat:128,0,0::\ndog:0,128,0::\n"
VOC_COLOURS = np.zeros((256, 3), np.uint8)
VOC_COLOURS[[1, 2, 255]] = (128, 0, 0), (0, 128, 0), BORDER
TRUTH = np.where(labels(4) == 3, 255, labels(4)).astype(np.uint8)


def write(folder: Path, pictures: list[str], masks: list[str], mask: Image.Image | None = None) -> Path:
    """A folder of these files, the pictures of the masks' size."""
    mask = mask or Image.fromarray(labels())
    for i, name in enumerate(pictures + masks):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (mask if name in masks else Image.new("RGB", mask.size, (20 * i, 0, 0))).save(folder / name)
    return folder


def write_voc(folder: Path, mask: Image.Image, lists: dict[str, str], masked: str = "abcde") -> Path:
    """Ten pictures, some with masks, and lists of stems."""
    write(folder, [f"JPEGImages/{s}.jpg" for s in "abcdefghij"], [f"SegmentationClass/{s}.png" for s in masked], mask)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, stems in lists.items():
        (folder / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    return folder


def told(folder: Path, capsys) -> str:
    """The line that says how the folder is read."""
    load(folder)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "read as" in line]
    return line.removeprefix(f"{folder}: ")


def test_images_and_masks(tmp_path, capsys):
    write(tmp_path, [f"images/{s}.jpg" for s in "abcde"], [f"masks/{s}_mask.tif" for s in "abcde"])
    assert told(tmp_path, capsys) == "read as images/ and masks/: 3 classes, 4 train + 1 test pictures"
    np.testing.assert_array_equal(load(tmp_path)[1]["c"].labels, labels())


@pytest.mark.parametrize("form", ["{part}/{split}/", "{split}/{part}/"], ids=["inside", "around"])
@pytest.mark.parametrize("val", ["val", "valid"])
def test_folders_of_splits(tmp_path, form, val, capsys):
    images, masks = ([form.format(part=part, split=s) + f"{s}{i}" for s in ("train", val, "test") for i in (0, 1)]
                     for part in ("images", "masks"))  # fmt: skip
    write(tmp_path, [f"{image}.jpg" for image in images], [f"{mask}.png" for mask in masks])
    line = told(tmp_path, capsys)
    assert line.startswith(f"read as images/ and masks/ by the folders train, {val}, test: 3 classes, ")
    assert line.endswith(" 2 train + 2 validation + 2 test pictures")
    assert split_of(tmp_path)["test"] == ["test/test0", "test/test1"]
    assert sorted(split_of(tmp_path)["val"]) == [f"{val}/{val}0", f"{val}/{val}1"]
    (tmp_path / f"{masks[0]}.png").unlink()
    assert "no mask in masks/ for: 1 (train/train0)" in refusal(tmp_path)


@pytest.mark.parametrize("form", ["{part}/{split}", "{split}/{part}"], ids=["inside", "around"])
def test_a_folder_of_pictures_to_be_segmented_is_left_out_and_told(tmp_path, form, capsys):
    images, masks = (form.format(part=part, split="train") for part in ("images", "masks"))
    write(tmp_path, [f"{images}/{s}.jpg" for s in "ab"], [f"{masks}/{s}.png" for s in "ab"])
    of_test = form.format(part="images", split="test")
    write(tmp_path, [f"{of_test}/c.jpg"], [])
    load(tmp_path, fraction=0)
    assert f"folders in images/ and masks/ are left out: 1 ({of_test}/)" in capsys.readouterr().out


def test_masks_beside_their_pictures(tmp_path, monkeypatch, capsys):
    stems = ["a", "b", "c", "d", "test"]
    write(tmp_path, [f"{stem}.jpg" for stem in stems], [f"{stem}_mask.tif" for stem in stems])
    write(tmp_path, ["a_overlay.png", "more/f.png"], [])
    (tmp_path / "classes.json").write_text('{"names": ["x", "y", "z"]}')
    (tmp_path / "test.txt").write_text("b\n")
    assert told(tmp_path, capsys) == "read as NAME beside NAME_mask: 3 classes, 4 train + 1 test pictures"
    monkeypatch.chdir(tmp_path)
    assert sorted(load(Path())[1]) == stems
    (tmp_path / "c_mask.tif").unlink()
    message = refusal(Path())
    assert f"no mask in {tmp_path.name}/ for: 1 (c)" in message
    assert f"overlays in {tmp_path.name}/ are left out: 1 (a_overlay)" in message
    assert f"folders in {tmp_path.name}/ are left out: 1 ({tmp_path.name}/more/)" in message


def test_pascal_voc_has_pictures_without_masks(tmp_path, capsys):
    write_voc(tmp_path, as_palette(TRUTH, VOC_COLOURS), {"train": "bac", "val": "ed", "trainval": "abcde"})
    names, examples = load(tmp_path)
    assert names == ("class_0", "class_1", "class_2")
    np.testing.assert_array_equal(examples["a"].labels, TRUTH)
    output = capsys.readouterr().out
    assert "read as Pascal VOC: 3 classes, 3 train + 2 validation + 0 test pictures" in output
    assert "pictures without a mask are left out: 5 (f, g, h, ...)" in output
    found = split_of(tmp_path)
    assert ([s for s in found["train"] if s not in found["val"]], sorted(found["val"])) == ([*"bac"], ["d", "e"])
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("d\nf\n")
    assert "no mask in SegmentationClass/ for: 1 (f)" in refusal(tmp_path)


@pytest.mark.parametrize("stored", ["RGB", "palette"])
def test_cvat_lists_its_colours(tmp_path, stored, capsys):
    mask = as_palette(TRUTH, VOC_COLOURS)
    write_voc(tmp_path, mask.convert("RGB") if stored == "RGB" else mask, {"default": "abcde"})
    (tmp_path / "labelmap.txt").write_text(LABELMAP)
    assert told(tmp_path, capsys) == "read as Pascal VOC: 3 classes, 4 train + 1 test pictures"
    names, examples = load(tmp_path)
    assert names == ("background", "cat", "dog")
    np.testing.assert_array_equal(examples["a"].labels, TRUTH)
    (tmp_path / "labelmap.txt").write_text("dog:0,128,0::\nignored:224,224,192::\nbackground:0,0,0::\ncat:128,0,0::\n")
    names, examples = load(tmp_path)
    assert names == ("dog", "background", "cat")
    np.testing.assert_array_equal(examples["a"].labels, np.choose(TRUTH % 252, [1, 2, 0, 255]))
    (tmp_path / "labelmap.txt").write_text("cat:128,0,0::\n")
    assert "values that are none of the 2 classes: 5 (a: #008000, " in refusal(tmp_path)
    (tmp_path / "classes.json").write_text('{"colours": [[0, 0, 0], [128, 0, 0], [0, 128, 0], [224, 224, 192]]}')
    assert len(load(tmp_path)[0]) == 4  # it goes before the label map
    for line in ("cat", "cat:red::", "cat:1,2::", "cat:1,2,256::"):
        (tmp_path / "classes.json").unlink(missing_ok=True)
        (tmp_path / "labelmap.txt").write_text(line)
        assert "labelmap.txt is not of the form label:red,green,blue:: a line: " in refusal(tmp_path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["images", "photos"], "images/ and masks/: masks/ is missing, it holds images, photos"),
        (["masks"], "images/ and masks/: images/ is missing, it holds masks"),
        (
            ["SegmentationClass", "SegmentationObject"],
            "JPEGImages/ and SegmentationClass/ (Pascal VOC): JPEGImages/ is missing, it holds SegmentationClass, ",
        ),
        (
            ["train/images", "val/images"],
            "train/images/ and train/masks/: train/masks/ is missing, it holds train, val",
        ),
        (
            ["imgs", "labels"],
            "images/ and masks/: it holds imgs, labels (other ways: JPEGImages/ and SegmentationClass/ (Pascal VOC), or"
            " train/images/ and train/masks/, or NAME_mask beside NAME)",
        ),
        (
            ["VOC2012/JPEGImages", "VOC2012/SegmentationClass"],
            "images/ and masks/: it holds such folders, give one of them: {0}/VOC2012",
        ),
    ],
)
def test_what_is_no_layout_is_refused_with_the_nearest(tmp_path, folders, message):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    assert f"the folder {tmp_path} is to hold {message.format(tmp_path)}" in refusal(tmp_path)


def test_refusals_of_the_command_name_the_layout(tmp_path):
    (tmp_path / "data" / "JPEGImages").mkdir(parents=True)
    message = execute(tmp_path, "train", "--dataset", "folder", "--data-dir", "data", status=2)
    assert "(Pascal VOC): SegmentationClass/ is missing, it holds JPEGImages" in message


def plain(mask: Image.Image, picture: str = "images/{}.jpg", masked: str = "masks/{}.png", **classes: list):
    """What fills a folder of five pictures and masks of such names, and classes.json if given."""

    def fill(folder: Path) -> None:
        write(folder, [picture.format(s) for s in "abcde"], [masked.format(s) for s in "abcde"], mask)
        if classes:
            (folder / "classes.json").write_text(json.dumps(classes))

    return fill


def by_split(folder: Path) -> None:
    """Folders of splits: two pictures to train, one for validation and three to test."""
    stems = ["train/a", "train/b", "val/c", "test/d", "test/e", "test/f"]
    write(folder, [f"images/{s}.jpg" for s in stems], [f"masks/{s}.png" for s in stems], INDICES)


def cvat(folder: Path) -> None:
    write_voc(folder, PALETTE.convert("RGB"), {"train": "ab", "val": "c", "test": "de"})
    (folder / "labelmap.txt").write_text(LABELMAP)


INDICES, PALETTE = Image.fromarray(TRUTH), as_palette(TRUTH, VOC_COLOURS)
OURS, VOC = list(plots.COLOURS[:3]), ["#000000", "#800000", "#008000"]
NUMBERED, XYZ = ["class_0", "class_1", "class_2"], ["x", "y", "z"]
LISTED = {"names": XYZ, "colours": [[0, 0, 0], [128, 0, 0], [0, 128, 0]], "ignore": [[*BORDER]]}
# What fills the folder; the part that is evaluated and its pictures; names and colours of the classes.
LAYOUTS = {
    "images and masks": (plain(INDICES), "test", 1, NUMBERED, OURS),
    "NAME_mask in TIFF": (plain(INDICES, "images/{}.tif", "masks/{}_mask.tif"), "test", 1, NUMBERED, OURS),
    "beside": (plain(INDICES, "{}.jpg", "{}_mask.png", names=XYZ), "test", 1, XYZ, OURS),
    "folders of splits": (by_split, "test", 3, NUMBERED, OURS),
    "Pascal VOC": (
        lambda folder: write_voc(folder, PALETTE, {"train": "abc", "val": "de"}), "validation", 2, NUMBERED, VOC,
    ),
    "CVAT": (cvat, "test", 2, ["background", "cat", "dog"], VOC),
    "0 and 255": (plain(Image.fromarray(255 * labels(2))), "test", 1, ["background", "foreground"], OURS[:2]),
    "colours": (plain(PALETTE.convert("RGB"), **LISTED), "test", 1, XYZ, VOC),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_trained_on_evaluated_and_predicted(tmp_path, layout, monkeypatch):
    fill, part, count, names, colours = LAYOUTS[layout]
    fill(tmp_path / "data")
    monkeypatch.setattr(device, "set_up", lambda folder: None)  # the tests have their own
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_: None)  # half of the time; test_plots.py draws
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    train("--data-dir", "data", "--epochs", 1, "--batch-size", 2, "--workdir", "run")
    result = evaluate("run")
    assert (result["split"], result["pictures"], list(result["iou"])) == (part, count, names)
    picture = next(path for path in sorted(Path("data").rglob("a.*")) if "ask" not in str(path))
    with pytest.raises(SystemExit) as ended:
        predict.command(["run", str(picture), "--out", "out"])
    assert not ended.value.code
    with Image.open("out/a_mask.png") as mask, Image.open("out/a_overlay.png") as overlay:
        assert (mask.mode, mask.size, overlay.size) == ("P", (24, 20), (24, 20))
        assert np.asarray(mask).max() < len(names)
        assert mask.getpalette()[: 3 * len(names)] == list(bytes.fromhex("".join(c[1:] for c in colours)))
