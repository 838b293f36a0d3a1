"""The experiments as users run them: whole commands on small synthetic pets, killed, resumed, refused, evaluated."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from check_faults import own_cache
from PIL import Image
from test_from_pytorch import make_state_dict, save_safetensors

from unet_jax import device, runs
from unet_jax.config import PUBLISHED, VARIANTS

ROOT = Path(__file__).parent.parent
SMALL = ["--dataset", "synthetic", "--image-size", "16", "--widths", "4", "4", "--train-examples", "12"]
SMALL += ["--test-examples", "5", "--batch-size", "8", "--epochs", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home of its own: cache, default data folder, and the folder that commands run in."""
    return tmp_path_factory.mktemp("home")


def command(home: Path, script: str, *flags: object) -> tuple[list[str], dict[str, str]]:
    env = dict(os.environ, HOME=str(home), XDG_CACHE_HOME=own_cache(home), TQDM_DISABLE="1")
    env.pop("TFDS_DATA_DIR", None)
    # Nothing listens there: the download is refused at once instead of being tried.
    env.update(dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"))
    start = [str(ROOT / "experiments" / script)] if script.endswith(".py") else ["-m", "unet_jax", script]
    return [sys.executable, *start, *map(str, flags)], env


def execute(home: Path, script: str, *flags: object, status: int = 0) -> str:
    """The output of a script, or of a command by its name.

    Checked: the exit status, and that a refusal is one line and no traceback.
    """
    args, env = command(home, script, *flags)
    done = subprocess.run(args, env=env, cwd=home, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if status == 2:
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1, done.stderr
    return done.stdout + done.stderr


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(run: Path):
    return runs.load(run, device.placement())[1].state


@pytest.fixture(scope="module")
def finished(home) -> Path:
    """All four variants, trained."""
    output = execute(home, "run.py", "--variant", "all", *SMALL, "--workdir", "all")
    assert "device: " in output.splitlines()[0]
    return home / "all"


def test_all_variants_end_to_end(finished):
    assert not (finished / "best").exists()
    for name in PUBLISHED:
        row = VARIANTS[name]
        run = finished / name
        expected = {"config.json", "environment.json", "metrics.jsonl", "metrics.png", "results.png", "summary.json"}
        expected |= {"checkpoints", "split.json", "scores.csv"}
        assert expected <= {p.name for p in run.iterdir()}
        config = json.loads((run / "config.json").read_text())
        assert (config["format_version"], config["data"]["dataset"]) == (1, "synthetic")
        assert (config["train"]["loss"], config["model"]["upsampling"]) == (row.loss, row.upsampling)
        assert [r["epoch"] for r in records(run)] == [1, 2]
        summary = json.loads((run / "summary.json").read_text())
        assert summary["epochs"] == 2
        assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(state_of(run).params))
        assert (run / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert int(state_of(run).step) == 4
    comparison = (finished / "comparison.md").read_text()
    assert all(f"| {name} | synthetic | 16 |" in comparison for name in PUBLISHED)
    assert "0.0909" in comparison
    assert (finished / "comparison.png").stat().st_size > 10_000


def test_finished_run_is_left_alone_and_more_epochs_go_on(home, finished):
    run = finished / "mp_tr_dice"
    before = (run / "metrics.jsonl").read_bytes()
    output = execute(home, "run.py", *SMALL, "--workdir", run)
    assert "has its 2 epochs already" in output
    assert (run / "metrics.jsonl").read_bytes() == before
    whole, more = home / "three", [*SMALL[:-1], "3"]
    execute(home, "run.py", *more, "--workdir", whole)
    assert "going on from step 4, after 2 epochs" in execute(home, "run.py", *more, "--workdir", run)
    chex.assert_trees_all_equal(state_of(run), state_of(whole))


def test_every_command_by_its_name(home):
    """As `unet-jax NAME`, from training to what is made of a run."""
    output = execute(home, "train", "--variant", "mp_tr_dice", *SMALL[:-1], 1, "--workdir", "named")
    assert "files in named" in output
    environment = json.loads((home / "named" / "environment.json").read_text())
    assert environment["command"][:3] == ["unet-jax", "train", "--variant"]
    assert "test loss" in execute(home, "evaluate", "named")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(home / "photo.png")
    assert "1 picture in" in execute(home, "predict", "named", "photo.png", "--out", "masks", "--tta")
    assert {p.name for p in (home / "masks").iterdir()} == {"photo_mask.png", "photo_overlay.png"}
    assert "x.png: there is no such file" in execute(home, "predict", "named", "x.png", "--out", "masks", status=2)
    assert "| mp_tr_dice | synthetic | 16 |" in execute(home, "report", "named", "--out", "reported")
    assert (home / "reported" / "report.png").exists()
    assert "no run folders are given" in execute(home, "report", "photo.png", status=2)
    if importlib.util.find_spec("flatbuffers"):
        assert "uint8 [" in execute(home, "export", "named", "--out", "model")
    flags = ["--variant", "strconv_tr_ce", "--out", "theirs", "--widths", 4, 6, "--image-size", 16]
    weights = make_state_dict("strided_conv", widths=(4, 6))
    save_safetensors(home / "x.safetensors", {n: ("F32", a.astype(np.float32)) for n, a in weights.items()})
    assert "theirs: strconv_tr_ce with the weights of" in execute(home, "import-torch", "x.safetensors", *flags)


def test_damaged_newest_checkpoint_is_skipped(home, finished):
    run = finished / "strconv_tr_ce"
    good = state_of(run)
    for file in (run / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (run / "summary.json").unlink()
    output = execute(home, "run.py", "--variant", "strconv_tr_ce", *SMALL, "--workdir", run)
    assert "checkpoint 4 in" in output
    assert "going on from step 2" in output
    chex.assert_trees_all_equal(state_of(run), good)


def test_evaluate_gives_the_metrics_of_training(home, finished):
    run = finished / "strconv_ups_dice"
    output = execute(home, "evaluate.py", run, "--out", "evaluated")
    result = json.loads((home / "evaluated" / "evaluation.json").read_text())
    trained = records(run)[-1]
    for key in ("test_loss", "test_cross_entropy", "test_log_dice", "mean_iou", "pixel_accuracy", "iou", "dice"):
        assert result[key] == trained[key]
    assert np.sum(result["confusion"]) == 5 * 16 * 16
    assert "| background |" in output
    assert (home / "evaluated" / "pictures.png").exists()
    on_train = json.loads(
        (
            execute(home, "evaluate.py", run, "--split", "train"),
            (run / "evaluation-train" / "evaluation.json").read_text(),
        )[1]
    )
    assert (on_train["split"], on_train["pictures"]) == ("train", 12)


def test_fine_tuning_starts_from_the_other_run(home, finished):
    other = finished / "mp_tr_dice"
    execute(home, "run.py", *SMALL[:-1], 1, "--learning-rate", 1e-12, "--init-from", other, "--workdir", "tuned")
    chex.assert_trees_all_close(state_of(home / "tuned").params, state_of(other).params, atol=1e-6)
    output = execute(
        home, "run.py", "--variant", "strconv_tr_ce", *SMALL, "--init-from", other, "--workdir", "x", status=2
    )
    assert "another network" in output
    assert not (home / "x").exists()


def test_auto_without_network_trains_on_synthetic_and_says_so(home):
    flags = [f for f in SMALL if f not in ("--dataset", "synthetic")]
    output = execute(home, "run.py", *flags)
    assert "SYNTHETIC PETS" in output
    assert "synthetic" in output.splitlines()[-1] or "on synthetic: test loss" in output
    config = json.loads((home / "runs" / "mp_tr_dice-synthetic" / "config.json").read_text())
    assert config["data"]["dataset"] == "synthetic"


REFUSALS = {
    "unknown variant": (["--variant", "mp_tr_dcie"], "did you mean mp_tr_dice"),
    "zero epochs": (["--epochs", "0"], "--epochs is 0"),
    "size": (["--image-size", "100", "--widths", *"44444"], "multiples of 16; the nearest size is 96x96"),
    "batch larger than the data": (["--batch-size", "13"], "larger than the 12 training pictures"),
    "loss": (["--loss", "dice"], "--loss has the term 'dice'"),
    "learning rate": (["--learning-rate", "-1"], "--learning-rate is -1"),
    "no such run to start from": (["--init-from", "nowhere"], "nowhere is no run folder"),
    "empty data folder": (["--dataset", "oxford_iiit_pet", "--data-dir", "."], "no prepared oxford_iiit_pet"),
    "auto never falls back with a data folder": (
        ["--dataset", "auto", "--data-dir", "."],
        "no prepared oxford_iiit_pet",
    ),
    "pets never fall back": (["--dataset", "oxford_iiit_pet"], "cannot be reached"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_in_one_line_and_nothing_written(home, name):
    flags, message = REFUSALS[name]
    assert message in execute(home, "run.py", *SMALL, "--workdir", "refused", *flags, status=2)
    assert not (home / "refused").exists()


def test_refusals_about_the_run_folder(home, finished, tmp_path):
    run = finished / "mp_tr_ce"
    config = (run / "config.json").read_bytes()
    output = execute(home, "run.py", "--variant", "mp_tr_ce", *SMALL, "--seed", 3, "--workdir", run, status=2)
    assert "train.seed: 0 -> 3" in output
    assert (run / "config.json").read_bytes() == config
    (tmp_path / "thesis.txt").write_text("mine")
    assert "holds other files" in execute(home, "run.py", *SMALL, "--workdir", tmp_path, status=2)
    with runs.lock(home / "locked"):
        assert "another process trains" in execute(home, "run.py", *SMALL, "--workdir", "locked", status=2)
    assert "is no run folder" in execute(home, "evaluate.py", tmp_path, status=2)
    (tmp_path / "config.json").write_bytes(config)
    assert "no complete checkpoint" in execute(home, "evaluate.py", tmp_path, status=2)
    (tmp_path / "config.json").write_bytes(config[:50])
    assert "cannot be read" in execute(home, "evaluate.py", tmp_path, status=2)


def test_overwrite_starts_anew_and_keeps_other_files(home, finished):
    run = home / "overwritten"
    execute(home, "run.py", *SMALL, "--workdir", run)
    (run / "notes.txt").write_text("mine")
    execute(home, "run.py", *SMALL, "--seed", 1, "--overwrite", "--workdir", run)
    assert json.loads((run / "config.json").read_text())["train"]["seed"] == 1
    assert (run / "notes.txt").read_text() == "mine"
    assert [r["epoch"] for r in records(run)] == [1, 2]
    # A run does not start anew from itself, nor without a word where its checkpoints are gone.
    flags = [*SMALL, "--seed", 1, "--workdir", run]
    refused = execute(home, "run.py", *flags, "--overwrite", "--init-from", run, status=2)
    assert "is the run itself, which would be lost" in refused
    (run / "checkpoints").rename(run / "away")
    refused = execute(home, "run.py", *flags, "--epochs", 3, status=2)
    assert "has 2 epochs but no checkpoint" in refused
    (run / "away").rename(run / "checkpoints")
    assert "going on from step" in execute(home, "run.py", *flags, "--epochs", 3)
    assert "notes.txt is no folder" in execute(home, "run.py", *SMALL, "--workdir", run / "notes.txt", status=2)


def test_help_names_the_flags(home):
    output = execute(home, "run.py", "--help")
    assert all(flag in output for flag in ("--variant", "--image-size", "--train-examples", "--workdir", "--init-from"))


def test_best_epoch_is_chosen_on_the_validation_part(home):
    flags = [
        *SMALL[:-1],
        "4",
        "--validation-fraction",
        0.34,
        "--learning-rate",
        0.1,
        "--ema",
        0.9,
        "--augment",
        "basic",
    ]
    run, once = home / "validated", {"mean_iou", "test_loss"}
    output = execute(home, "run.py", *flags, "--workdir", run)
    assert "Validation part: average loss" in output
    lines = records(run)
    assert all("validation_loss" in r and not once & set(r) for r in lines)
    ious = [r["validation_mean_iou"] for r in lines]
    best = max(range(4), key=lambda i: (ious[i], i)) + 1
    test = json.loads((run / "summary.json").read_text())["test"]
    assert test["epoch"] == best
    assert int(state_of(run).step) == best  # of the eight training pictures each epoch is one step
    assert max(int(p.name) for p in (run / "best").iterdir()) == best
    assert f"mean IoU {test['mean_iou']:.4f} after {best} epoch" in output
    execute(home, "evaluate.py", run, "--split", "validation")
    result = json.loads((run / "evaluation-validation" / "evaluation.json").read_text())
    assert (result["pictures"], result["mean_iou"]) == (4, ious[best - 1])
    execute(home, "evaluate.py", run)
    assert json.loads((run / "evaluation-test" / "evaluation.json").read_text())["mean_iou"] == test["mean_iou"]
    # Going on takes the newest checkpoint all the same.
    assert "going on from step 4, after 4 epochs" in execute(home, "run.py", *flags, "--epochs", 5, "--workdir", run)
    other = execute(home, "evaluate.py", home / "all" / "mp_tr_ce", "--split", "validation", status=2)
    assert "kept no part of train" in other or "is no run folder" in other
