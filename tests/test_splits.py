"""Which pictures a run is trained and tested on: lists, names, folders, and runs that go on or are evaluated."""

import csv
import dataclasses
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folder import COLOURS, as_palette, config, labels, load, save
from test_run import records

from unet_jax import device, runs, splits
from unet_jax.commands import evaluate as evaluate_command
from unet_jax.commands import train as train_command
from unet_jax.commands.export import command as export
from unet_jax.commands.predict import Options as predict_options
from unet_jax.commands.predict import main as predict
from unet_jax.commands.predict import mask_of
from unet_jax.data.batches import validation_rows
from unet_jax.data.folder import fill_in, sources
from unet_jax.errors import InputError
from unet_jax.plots import palette
from unet_jax.start import tell_overlap


def fill(folder: Path, count: int = 8) -> Path:
    for i in range(count):
        save(folder, f"p{i}", np.roll(labels(2), i), np.full((20, 24, 3), 30 * i, np.uint8))
    return folder


def write_lists(folder: Path, **lists: str) -> None:
    for name in ("train", "val", "test"):
        (folder / f"{name}.txt").unlink(missing_ok=True)
    for name, stems in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(stems.split()))


def split_of(folder: Path, **fields) -> dict[str, list[str]]:
    found = sources(fill_in(config(folder, **fields), 0), 0)
    return {"train": list(found["train"].names), "test": list(found["test"].names), "val": [*found["train"].validation]}


def refusal(folder: Path, **fields) -> str:
    with pytest.raises(InputError) as error:
        fill_in(config(folder, **fields), 0)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_val_txt_is_the_validation_part(tmp_path):
    write_lists(fill(tmp_path), train="p0 p1 p2 p3", val="p4 p5", test="p6")
    data = fill_in(config(tmp_path), 0)
    assert data.validation_fraction == 2 / 6
    train = sources(data, 0)["train"]
    assert (train.names, train.validation) == (["p0", "p4", "p1", "p2", "p5", "p3"], {"p4", "p5"})
    training, validation = validation_rows(train.names, data.validation_fraction, 0, train.validation)
    assert [train.names[i] for i in validation] == ["p4", "p5"]
    assert [train.names[i] for i in training] == ["p0", "p1", "p2", "p3"]
    assert "leave --validation-fraction out" in refusal(tmp_path, validation_fraction=0.5)
    write_lists(tmp_path, train="p0 p1 p2 p3", val="p4 p5 p6 p7")
    assert split_of(tmp_path)["test"] == []
    write_lists(tmp_path, val="p4 p5")
    found = split_of(tmp_path)
    assert sorted(found["train"] + found["test"]) == [f"p{i}" for i in range(8)]
    assert (len(found["test"]), sorted(found["val"])) == (1, ["p4", "p5"])


def test_folders_of_the_splits_are_the_splits(tmp_path):
    for split in ("train", "val", "test"):
        fill(tmp_path / "of" / split, 2)
        for part in ("images", "masks"):
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / "of" / split / part).rename(tmp_path / part / split)
    found = split_of(tmp_path)
    assert found["train"] == ["train/p0", "val/p0", "train/p1", "val/p1"]
    assert (sorted(found["val"]), found["test"]) == (["val/p0", "val/p1"], ["test/p0", "test/p1"])
    np.testing.assert_array_equal(load(tmp_path)[1]["val/p1"].labels, np.roll(labels(2), 1))
    write_lists(tmp_path, test="test/p1.png")
    assert split_of(tmp_path)["test"] == ["test/p1"]
    write_lists(tmp_path)
    shutil.move(tmp_path / "masks" / "test" / "p0.png", tmp_path / "masks" / "p0.png")
    assert "no mask in masks/ for: 1 (test/p0)" in refusal(tmp_path)


def test_lists_may_name_files(tmp_path):
    write_lists(fill(tmp_path), train="p0.png images/p1.png", test="p2")
    found = split_of(tmp_path)
    assert (found["train"], found["test"]) == (["p0", "p1"], ["p2"])


def test_lists_of_powershell_are_read(tmp_path):
    write_lists(fill(tmp_path), test="p1 p2")
    before = split_of(tmp_path)
    (tmp_path / "test.txt").write_text("p1\r\np2\r\n", "utf-16")
    assert split_of(tmp_path) == before
    (tmp_path / "train.txt").mkdir()  # no list
    assert split_of(tmp_path) == before


def test_names_match_in_whichever_form_their_accents_are_written(tmp_path):
    fill(tmp_path, 3)
    for i in range(3):
        apart, whole = (unicodedata.normalize(form, f"caf\u00e9{i}") for form in ("NFD", "NFC"))
        assert apart != whole
        (tmp_path / "images" / f"p{i}.png").rename(tmp_path / "images" / f"{whole if i else apart}.png")
        (tmp_path / "masks" / f"p{i}.png").rename(
            tmp_path / "masks" / f"{apart if i else whole}{'_mask' * (i > 1)}.png"
        )
    (tmp_path / "test.txt").write_text(unicodedata.normalize("NFD", "caf\u00e92.png"), "utf-8")
    found = split_of(tmp_path)
    assert found["test"] == ["caf\u00e92"]  # as the pictures have it
    assert sorted(found["train"]) == sorted([unicodedata.normalize("NFD", "caf\u00e90"), "caf\u00e91"])
    np.testing.assert_array_equal(load(tmp_path)[1]["caf\u00e92"].labels, np.roll(labels(2), 2))


def test_a_class_that_no_training_picture_has_is_told(tmp_path, capsys):
    write_lists(fill(tmp_path), test="p0")
    save(tmp_path, "p0", labels(3))
    load(tmp_path, ("x", "y", "rare"))
    assert capsys.readouterr().out.count("no training picture has rare, so that nothing of it can be learnt") == 1
    write_lists(tmp_path, train="p0 p1", test="p2")
    load(tmp_path, ("x", "y", "rare"))
    assert "no training picture has" not in capsys.readouterr().out


def test_pictures_in_no_list_and_folders_are_told(tmp_path, capsys):
    write_lists(fill(tmp_path), train="p0 p1", test="p2")
    (tmp_path / "images" / "more").mkdir()
    load(tmp_path)
    output = capsys.readouterr().out
    assert "pictures in none of its lists are left out: 5 (p3, p4, p5, ...)" in output
    assert "folders in images/ and masks/ are left out: 1 (images/more/)" in output


def test_no_test_at_all(tmp_path):
    fill(tmp_path)
    found = split_of(tmp_path, fraction=0)
    assert (sorted(found["train"]), found["test"]) == ([f"p{i}" for i in range(8)], [])
    write_lists(tmp_path, train=" ".join(found["train"]))
    assert "splits without pictures (--test-fraction 0 trains without a test): 1 (test)" in refusal(tmp_path)
    assert split_of(tmp_path, fraction=0)["test"] == []
    write_lists(tmp_path, train="p0 p1", test="")
    assert "splits without pictures: 1 (test)" in refusal(tmp_path, fraction=0)


def test_masks_named_by_other_tools(tmp_path, capsys):
    fill(tmp_path, 3)
    for i, ending in enumerate(("_mask.gif", "_mask.png", ".tif")):
        path = tmp_path / "masks" / f"p{i}.png"
        with Image.open(path) as mask:
            mask.save(path.with_name(f"p{i}{ending}"))
        path.unlink()
    Image.new("L", (24, 20)).save(tmp_path / "masks" / "p1_overlay.png")  # beside our own predictions
    examples = load(tmp_path)[1]
    for i in range(3):
        np.testing.assert_array_equal(examples[f"p{i}"].labels, np.roll(labels(2), i))
    assert "overlays in masks/ are left out: 1 (p1_overlay)" in capsys.readouterr().out
    Image.new("L", (24, 20)).save(tmp_path / "masks" / "p1.png")
    assert "several files for: 1 (masks/p1)" in refusal(tmp_path)


def test_pages_beyond_the_first_are_refused(tmp_path):
    fill(tmp_path, 2)
    page = Image.new("RGB", (24, 20))
    (tmp_path / "images" / "p0.png").unlink()
    page.save(tmp_path / "images" / "p0.tif", save_all=True, append_images=[page, page])
    Image.fromarray(labels(2)).save(
        tmp_path / "masks" / "p1.tif", save_all=True, append_images=[Image.new("L", (24, 20))]
    )
    (tmp_path / "masks" / "p1.png").unlink()
    message = refusal(tmp_path)
    assert "images/p0.tif: holds 3 pictures (pages or frames): save each in a file of its own" in message
    assert "masks/p1.tif: holds 2 pictures" in message


def test_side_by_side_in_one_folder_is_told_at_once(tmp_path):
    fill(tmp_path, 2)
    for i in range(2):
        Image.new("RGB", (24, 20)).save(tmp_path / "images" / f"p{i}.jpg")
    (tmp_path / "masks" / "p1.png").unlink()
    message = refusal(tmp_path)
    assert "several files for: 2 (images/p0, images/p1)" in message
    assert "no mask in masks/ for: 1 (p1)" in message


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Commands run in this process, from a folder with pictures in data/."""
    monkeypatch.setattr(device, "set_up", lambda folder: None)  # the tests have their own
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    write_lists(fill(tmp_path / "data"), train="p0 p1 p2 p3", val="p4", test="p5 p6 p7")
    return tmp_path


def train(*flags: object) -> None:
    flags = ("--dataset", "folder", "--image-size", "16", "--widths", "4", "4", "--cache-dir", "cache", *flags)
    train_command.train_runs(train_command.parse([str(flag) for flag in flags]))


def evaluate(run: str, **options) -> dict:
    evaluate_command.evaluate_run(evaluate_command.Options(Path(run), cache_dir="cache", out=Path("out"), **options))
    with Path("out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    result = json.loads(Path("out/evaluation.json").read_text())
    assert [row["picture"] for row in rows] == json.loads(Path("out/split.json").read_text())[result["split"]]
    return result | {"rows": rows}


def test_a_run_knows_its_pictures(here, monkeypatch, capsys):
    flags = ("--data-dir", "data", "--workdir", "runs/a")
    train(*flags, "--epochs", 1)
    split = json.loads(Path("runs/a/split.json").read_text())
    assert split == {"train": ["p0", "p1", "p2", "p3"], "validation": ["p4"], "test": ["p5", "p6", "p7"]}
    with Path("runs/a/scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert [row["picture"] for row in scores] == split["test"]
    result = evaluate("runs/a")
    assert result["rows"] == scores
    assert result["mean_iou"] == json.loads(Path("runs/a/summary.json").read_text())["test"]["mean_iou"]
    assert (evaluate("runs/a", split="validation")["pictures"], evaluate("runs/a", split="all")["pictures"]) == (1, 8)

    # Nothing of this machine is in the config, and the pictures are found from elsewhere.
    assert json.loads(Path("runs/a/config.json").read_text())["data"]["data_dir"] == "data"
    assert json.loads(Path("runs/a/environment.json").read_text())["data_dir"] == "../../data"
    Path("elsewhere/data").mkdir(parents=True)
    monkeypatch.chdir("elsewhere")
    assert evaluate("../runs/a")["rows"] == scores
    monkeypatch.chdir(here)

    # Another folder is scored whole, one that was moved is the run's own.
    shutil.copytree("data", "other")
    (here / "data").rename(here / "moved")
    with pytest.raises(InputError, match=r"runs/a was trained on the pictures in data, .*: give a --data-dir"):
        evaluate("runs/a")
    assert evaluate("runs/a", data_dir="moved")["pictures"] == 3
    write_lists(here / "other", test=" ".join(f"p{i}" for i in range(8)))
    capsys.readouterr()
    assert (result := evaluate("runs/a", data_dir="other"))["split"] == "all"
    assert result["pictures"] == 8
    assert "5 of these 8 pictures have names that runs/a was trained on (p0, p1, p2, ...)" in capsys.readouterr().out

    # Only pictures that were divided as the run's were have its parts.
    write_lists(here / "other", train="p0 p1 p2 p3", test="p4 p5")
    with pytest.raises(InputError, match="other is not divided as the run's pictures were: choose --split train, test"):
        evaluate("runs/a", data_dir="other", split="validation")
    assert evaluate("runs/a", data_dir="other", split="train")["pictures"] == 4
    write_lists(here / "moved", train="p0 p1 p2 p4", val="p3", test="p5 p6 p7")
    with pytest.raises(InputError, match="moved has other validation pictures than runs/a had"):
        evaluate("runs/a", data_dir="moved", split="validation")

    # Other lists make another run, and no test.
    (here / "moved").rename(here / "data")
    write_lists(here / "data", train="p5 p6 p7 p3", val="p4", test="p0 p1 p2")
    before = Path("runs/a/metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"runs/a has other pictures in its train and test split, .*p0, p1, p2, "):
        train(*flags, "--epochs", 2)
    with pytest.raises(InputError, match="3 of these 3 pictures have names that runs/a was trained on"):
        evaluate("runs/a")
    assert Path("runs/a/metrics.jsonl").read_bytes() == before
    Path("runs/a/split.json").unlink()  # as a run of an older version
    train(*flags, "--epochs", 2)
    assert len(records(Path("runs/a"))) == 2


def test_test_pictures_that_the_first_weights_have_seen_are_told(here, capsys):
    write_lists(here / "data")
    flags = ("--data-dir", "data", "--epochs", 1, "--validation-fraction", 0.3)
    train(*flags, "--workdir", "runs/a")
    train(*flags, "--workdir", "runs/same", "--init-from", "runs/a")
    assert "init_from:" not in capsys.readouterr().out
    train(*flags, "--workdir", "runs/b", "--init-from", "runs/a", "--seed", 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("init_from:")]
    first, second = (splits.read(Path("runs") / name) for name in "ab")
    tested = [name for name in second["test"] if name not in first["test"]]
    validated = [name for name in second["validation"] if name in first["train"]]
    assert tested
    assert validated
    assert line == (
        f"init_from: {len(tested)} of 2 test pictures ({', '.join(tested)}) and {len(validated)} of 2 validation"
        f" pictures ({', '.join(validated)}) have names that runs/a was trained on: if they are the same pictures,"
        " their scores will be too good (the same seed and fractions keep the split)"
    )
    evaluate("runs/b")
    assert (
        f"{len(tested)} of these 2 pictures have names that runs/b, or a run that it started from, was trained on"
        in (capsys.readouterr().out)
    )

    # The runs before count as far as they are there.
    trained = runs.read_config(Path("runs/b"))
    later = dataclasses.replace(trained, train=dataclasses.replace(trained.train, init_from="runs/b"))
    tell_overlap(later, {"test": first["train"], "validation": []})
    count = len(first["train"])
    assert f"init_from: {count} of {count} test pictures" in capsys.readouterr().out
    shutil.rmtree("runs/a")
    tell_overlap(later, {"test": first["test"], "validation": []})
    left = {*first["test"]} - {*second["test"]}
    assert f"init_from: {len(left)} of 2 test pictures" in capsys.readouterr().out

    # An export has no names, which may be private.
    export(["runs/b", "--out", "exported", "--format", "weights"])
    unknown = "exported has no split.json, so it is not known which pictures it was trained on"
    evaluate("exported", data_dir="data")
    assert unknown in capsys.readouterr().out
    tell_overlap(
        dataclasses.replace(trained, train=dataclasses.replace(trained.train, init_from="exported")),
        {"test": ["p0"], "validation": []},
    )
    assert capsys.readouterr().out.startswith(f"init_from: {unknown}")


def test_a_run_without_test(here, capsys):
    write_lists(here / "data")
    train("--data-dir", "data", "--workdir", "runs/b", "--epochs", 1, "--test-fraction", 0)
    output = capsys.readouterr().out
    assert "there are no pictures to test on" in output
    assert "no test after 1 epoch;" in output
    assert "test_loss" not in records(Path("runs/b"))[0]
    assert sorted(splits.read(Path("runs/b"))["train"]) == [f"p{i}" for i in range(8)]
    assert {"metrics.png", "results.png", "summary.json"} <= {path.name for path in Path("runs/b").iterdir()}
    assert not Path("runs/b/scores.csv").exists()
    with pytest.raises(InputError, match="no pictures in the test split: choose another --split, such as all"):
        evaluate("runs/b")
    assert evaluate("runs/b", split="all")["pictures"] == 8


@pytest.fixture
def squares(here):
    """Makes a folder of masks, by stem, and its classes.json."""

    def make(folder: str, change, classes: str = "", count: int = 8) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        for i in range(count):
            truth = np.zeros((24, 24), np.uint8)
            truth[: 4 + i, :9] = 1
            save(Path(folder), f"{folder}{i}", change(truth), np.full((24, 24, 3), 30 * i, np.uint8))
        if classes:
            (Path(folder) / "classes.json").write_text(classes)
        return folder

    return make


SWAPPED = '{"names": ["object", "ground"], "colours": [255, 0]}'


def test_a_run_keeps_to_what_its_classes_json_listed(squares, capsys):
    def binary(truth):
        return truth * np.uint8(255)

    flags = ("--data-dir", squares("own", binary, SWAPPED), "--workdir", "runs/a", "--test-fraction", 0.5)
    train(*flags, "--epochs", 1)
    assert json.loads(Path("runs/a/config.json").read_text())["data"]["mask_values"] == ["255", "0"]
    capsys.readouterr()
    with_file = evaluate("runs/a", data_dir=squares("other", binary, SWAPPED))
    assert "its classes.json lists" not in capsys.readouterr().out
    without = evaluate("runs/a", data_dir=squares("other", binary))
    assert with_file["confusion"] == without["confusion"]
    with pytest.raises(InputError, match=r"values that are none of the 2 classes: 8 \(other0: 1, other1: 1, "):
        evaluate("runs/a", data_dir=squares("other", lambda truth: truth))

    # Another folder may have other values; a run that goes on may not.
    capsys.readouterr()
    turned = SWAPPED.replace("255, 0", "0, 255")
    inverted = evaluate("runs/a", data_dir=squares("other", lambda truth: binary(1 - truth), turned))
    assert inverted["confusion"] == with_file["confusion"]
    assert "other: its classes.json lists 0, 255; the run's, 255, 0" in capsys.readouterr().out
    Path("own/classes.json").write_text(turned)
    with pytest.raises(InputError, match=r"data.mask_values: \('255', '0'\) -> \('0', '255'\)"):
        train(*flags, "--epochs", 2)

    # A run of an older version has kept nothing, and goes on as before.
    values = json.loads(Path("runs/a/config.json").read_text())
    del values["data"]["mask_values"], values["data"]["mask_palette"]
    Path("runs/a/config.json").write_text(json.dumps(values))
    train(*flags, "--epochs", 2)
    assert len(records(Path("runs/a"))) == 2


def test_predicted_masks_have_the_values_of_the_runs_classes_json(squares):
    values = '{"names": ["object", "ground"], "colours": [7, 3], "ignore": [0]}'
    flags = ("--data-dir", squares("own", lambda truth: 3 + 4 * truth, values), "--workdir", "runs/a")
    train(*flags, "--epochs", 1)
    predict(predict_options(Path("runs/a"), ("own/images",), Path("again/masks")))
    with Image.open("again/masks/own0_mask.png") as mask:
        assert {*np.unique(mask)} <= {3, 7}
        assert mask.convert("RGB").getpixel((0, 0)) in {tuple(colour) for colour in palette(2)}
    shutil.copytree("own/images", "again/images")
    for overlay in Path("again/masks").glob("*_overlay.png"):
        overlay.unlink()
    assert evaluate("runs/a", data_dir="again", full_size=True, split="all")["mean_iou"] == 1


@pytest.mark.parametrize(
    ("listed", "stored"),
    [((), [0, 1]), (("1000", "5", "0"), [1000, 5]), (("#ff0000", "#00ff00"), [0, 1]), (None, [0, 1])],
)
def test_values_of_masks_that_are_written(listed, stored):
    data = dataclasses.replace(config(Path()), class_names=("x", "y"), mask_values=listed)
    mask = mask_of(np.array([[0, 1]], np.uint8), data)
    assert np.asarray(mask).tolist() == [stored]
    assert mask.mode == ("I;16" if 1000 in stored else "P")


def test_edited_masks_are_told_when_a_run_goes_on(here, capsys):
    flags = ("--data-dir", "data", "--workdir", "runs/a")
    train(*flags, "--epochs", 1)
    train(*flags, "--epochs", 2)
    assert "with other pictures or masks" not in capsys.readouterr().err
    save(here / "data", "p0", 1 - labels(2), np.zeros((20, 24, 3), np.uint8))
    train(*flags, "--epochs", 3)
    assert "runs/a goes on with other pictures or masks than it began with" in capsys.readouterr().err
    assert "pictures" in json.loads(Path("runs/a/environment.json").read_text())["resumed"][-1]


def test_names_are_known_whether_or_not_a_split_folder_holds_them():
    asked = ["a", "train/b", "test/c", "test/d//0,64", "e", "part/a"]
    assert splits.among(asked, {"a", "b", "train/c", "d", "test/e"}) == ["a", "train/b", "test/d//0,64", "e"]


def test_the_results_of_other_pictures_stand_beside_those_of_its_own(here):
    train("--data-dir", "data", "--workdir", "runs/a", "--epochs", 1)
    shutil.copytree("data", "site b")
    write_lists(here / "site b", test=" ".join(f"p{i}" for i in range(8)))
    for data_dir, split in ((None, "test"), ("site b", "all")):
        options = evaluate_command.Options(Path("runs/a"), data_dir=data_dir, split=split, cache_dir="cache")
        evaluate_command.evaluate_run(options)
    own, other = (
        json.loads(Path("runs/a", name, "evaluation.json").read_text())
        for name in ("evaluation-test", "evaluation-site b-all")
    )
    assert (own["data_dir"], own["pictures"], other["data_dir"], other["pictures"]) == ("data", 3, "site b", 8)


def test_a_run_keeps_to_the_colours_of_its_palette(squares):
    def indexed(*order: int):
        return lambda truth: as_palette(np.array(order, np.uint8)[truth + 1], COLOURS[[*order]])

    flags = ("--data-dir", squares("own", indexed(0, 1, 2)), "--workdir", "runs/a", "--class-names", "x", "y", "z")
    train(*flags, "--epochs", 1)
    own = evaluate("runs/a", data_dir=squares("other", indexed(0, 1, 2)))
    assert json.loads(Path("runs/a/config.json").read_text())["data"]["mask_palette"] == ["", "#c80000", "#0000ff"]
    squares("other", indexed(0, 2, 1))
    with pytest.raises(
        InputError, match=r"palettes have other colours.*8 \(other0: 2 is #c80000, not #0000ff, "
    ) as error:
        evaluate("runs/a", data_dir="other")
    assert '"colours": [0, 1, 2]' in str(error.value)
    Path("other/classes.json").write_text(json.dumps({"colours": COLOURS.tolist()}))
    assert evaluate("runs/a", data_dir="other")["confusion"] == own["confusion"]
    Path("other/classes.json").write_text('{"colours": [0, 1, 2]}')
    assert evaluate("runs/a", data_dir="other")["confusion"] != own["confusion"]
    assert evaluate("runs/a", data_dir=squares("other", lambda truth: truth + 1))["confusion"] == own["confusion"]
