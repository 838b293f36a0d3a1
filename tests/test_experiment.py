"""A run from Python: trained, left alone when done, gone on with, and refused in Python's names."""

import dataclasses
import json
import re
import signal
import subprocess
import textwrap
import threading
from pathlib import Path

import chex
import numpy as np
import pytest
from check_faults import own_cache
from PIL import Image

import unet_jax
from unet_jax import device, environment, experiment, runs
from unet_jax.config import ModelConfig, RunConfig, default_config, to_dict
from unet_jax.errors import InputError, names_for_flags
from unet_jax.signals import noticing
from unet_jax.start import settle_precision


def small(epochs: int, **train) -> RunConfig:
    config = default_config("mp_tr_ce", "synthetic")
    data = dataclasses.replace(config.data, image_size=16, train_examples=12, test_examples=5)
    train = dataclasses.replace(config.train, batch_size=8, epochs=epochs, **train)
    return dataclasses.replace(config, data=data, train=train, model=ModelConfig(widths=(4, 4)))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`unet_jax.run` into tmp_path/run, with the cache and JAX as the tests have them."""
    monkeypatch.setattr(device, "set_up", lambda folder: None)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return lambda config, name="run", **options: unet_jax.run(
        config, tmp_path / name, cache_dir=tmp_path / "cache", **options
    )


def state_of(folder: Path):
    return runs.load(folder, device.placement())[1].state


def test_a_run_from_python_trains_goes_on_and_predicts(run, capsys):
    folder = run(small(1))
    assert {"config.json", "metrics.jsonl", "summary.json", "results.png"} <= {path.name for path in folder.iterdir()}
    assert runs.read_config(folder).model.precision == device.fastest_precision(device.placement())
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run(small(1)) == folder
    assert "has its 1 epoch already" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before

    run(small(2))
    assert "going on from step 2, after 1 epoch" in capsys.readouterr().out
    chex.assert_trees_all_equal(state_of(folder), state_of(run(small(2), "whole")))
    labels = unet_jax.load(folder)(np.zeros((20, 30, 3), np.uint8))
    assert (labels.shape, labels.dtype) == ((20, 30), np.uint8)

    notes, evaluation = folder / "evaluation-notes", folder / "evaluation-test"
    for path in (notes, evaluation):
        path.mkdir()
    (evaluation / "evaluation.json").write_text("{}")
    run(small(1, seed=1), overwrite=True)
    assert (notes.exists(), evaluation.exists()) == (True, False)
    assert json.loads((folder / "config.json").read_text())["train"]["seed"] == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_that_another_process_finished_in_the_meantime_is_not_taken_for_ones_own(run, monkeypatch):
    load_splits, other = experiment.load_splits, small(1, learning_rate=0.5)

    def slow(config, cache_dir):
        monkeypatch.setattr(experiment, "load_splits", load_splits)
        run(small(1))  # the other process, while this one decodes its pictures
        return load_splits(config, cache_dir)

    monkeypatch.setattr(experiment, "load_splits", slow)
    with pytest.raises(InputError, match=r"holds a run with another config \(train.learning_rate: 0.001 -> 0.5\)"):
        run(other)


def test_the_commit_is_that_of_the_packages_own_repository(tmp_path):
    def git(*words):
        given = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(given, check=True, capture_output=True)

    package = tmp_path / "venv" / "unet_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / ".gitignore").write_text("venv")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "theirs")
    assert environment._git_commit(package) is None
    git("add", "--force", ".")
    git("commit", "-qm", "ours")
    assert re.fullmatch("[0-9a-f]{40}", environment._git_commit(package) or "")


def test_a_run_that_goes_on_keeps_where_and_how_it_began(run, monkeypatch):
    def now(commit: str) -> None:
        monkeypatch.setattr(environment, "current", lambda: {"device": "a", "git_commit": commit})

    def written(folder: Path) -> dict:
        values = json.loads((folder / "environment.json").read_text())
        assert {part: len(sums) for part, sums in values.pop("pictures").items()} == {"train": 2, "test": 2}
        return values

    now("1")
    folder = run(small(1))
    assert written(folder) == {"device": "a", "git_commit": "1"}
    now("2")
    second = {"after_epoch": 1, "git_commit": "2"}
    assert written(run(small(2))) == {"device": "a", "git_commit": "1", "resumed": [second]}
    pictures = json.loads((folder / "environment.json").read_text())["pictures"]
    environment.write(folder, small(3), 2, pictures)
    assert written(folder)["resumed"] == [second]
    now("1")
    environment.write(folder, small(4), 3, pictures)
    assert written(folder)["resumed"] == [second, {"after_epoch": 3, "git_commit": "1"}]
    environment.write(folder, small(4), pictures=pictures)  # anew
    assert written(folder) == {"device": "a", "git_commit": "1"}


def test_the_lines_of_the_docstring_run(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", own_cache(tmp_path))
    monkeypatch.setattr(unet_jax.config, "default_config", lambda variant, dataset: small(1))
    Image.new("L", (30, 20)).save("photo.jpg")
    lines = [line for line in unet_jax.__doc__.splitlines() if not line or line.startswith("    ")]
    names: dict = {}
    exec(textwrap.dedent("\n".join(lines)), names)
    assert (names["mask"].shape, names["mask"].dtype) == ((20, 30), np.uint8)
    np.testing.assert_array_equal(names["probabilities"].argmax(-1), names["mask"])
    assert names["network"].layers.__name__ == "unet_jax.layers"
    assert names["loss"] is unet_jax.losses.cross_entropy


def test_the_page_on_python_runs_as_written():
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:3]:
        exec(block.replace("(2, 64, 64", "(2, 16, 16"), names)
        assert names["logits"].shape == (2, 16, 16, 3)
    assert np.isfinite(names["loss"])


def test_own_network_optimizer_and_loss_train_as_the_page_says(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(small(3), model=ModelConfig(widths=(8, 8)))
    monkeypatch.setenv("XDG_CACHE_HOME", own_cache(tmp_path))
    monkeypatch.setattr(unet_jax.config, "default_config", lambda variant, dataset: config)
    page = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    blocks = (
        re.findall(r"```python\n(.*?)```", page.split(f"## {title}\n")[1], re.DOTALL)[:2]
        for title in ("Training", "Change one piece")
    )
    (training, arrays), (changed, keeping) = blocks
    names: dict = {}
    exec(training, names)
    assert len(capsys.readouterr().out.splitlines()) == 3
    exec(arrays, names)
    assert next(names["own"].epoch(0, 1)).images.shape == (4, 64, 64, 3)
    exec(changed, names)
    assert len(capsys.readouterr().out.splitlines()) == 3
    exec(keeping, names)
    np.testing.assert_array_equal(names["masks"], names["steps"].predict(names["result"].state, names["images"]))
    assert names["state"].batch_stats == {}
    assert "GroupNorm_0" in names["state"].params["encoder1"]["norm1"]
    assert "trace" in str(names["result"].state.opt_state[0])  # of SGD's momentum
    loss = unet_jax.losses.cross_entropy
    logits, labels = np.zeros((2, 4, 4, 3), np.float32), np.ones((2, 4, 4), np.uint8)
    np.testing.assert_allclose(names["focal"](logits, labels), (2 / 3) ** 2 * loss(logits, labels), rtol=1e-6)


def test_lists_paths_and_numbers_of_numpy_make_the_same_run(run, tmp_path, capsys):
    first = run(small(1), "first")
    plain = small(1, class_weights=(1.0, 2.0, 1.0), learning_rate=0.125, init_from=str(first))
    given = small(
        np.int64(1), class_weights=[1.0, np.float64(2), 1.0], learning_rate=np.float32(0.125), init_from=first
    )
    run(dataclasses.replace(given, data=dataclasses.replace(given.data, data_dir=tmp_path)))
    capsys.readouterr()
    run(plain)
    assert "has its 1 epoch already" in capsys.readouterr().out


def stop_after(step: int, train):
    """Calls `train`, and sends SIGTERM to its run after this many steps of it."""
    display = experiment.Display.step

    def stop(self, *args):
        display(self, *args)
        if self.clock.ticks == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Display, "step", stop)
        with pytest.raises(SystemExit) as ended:
            train()
    assert ended.value.code == 143


def test_sigterm_ends_it_with_a_checkpoint(run):
    stop_after(3, lambda: run(small(2), "stopped"))
    folder = run(small(2), "stopped")
    chex.assert_trees_all_equal(state_of(folder), state_of(run(small(2))))


def test_averaged_weights_are_read_from_the_end_of_an_epoch(run, tmp_path, capsys):
    config = small(2, ema=0.9)  # two steps an epoch
    stop_after(1, lambda: run(config, "stopped"))
    with pytest.raises(InputError, match=r"checkpoint 1 .* middle of an epoch.*: train on to the end of the epoch"):
        unet_jax.load(tmp_path / "stopped")
    stop_after(2, lambda: run(config, "stopped"))
    state = state_of(tmp_path / "stopped")
    assert int(state.step) == 2
    assert "checkpoint 3 in" in capsys.readouterr().err
    chex.assert_trees_all_equal(state, state_of(run(small(1, ema=0.9), "one")))
    chex.assert_trees_all_equal(state_of(run(config, "stopped")), state_of(run(config)))


def test_patience_ends_a_run_once_and_for_all(run, monkeypatch, capsys):
    config = small(9, patience=2, learning_rate=1e-12)  # so that no epoch is better than the first
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_fraction=0.34))
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=12))
    folder = run(config)
    assert "stopped early: in 2 epochs the validation part's mean IoU has not risen" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["epochs"], summary["stopped_early"]) == (3, True)
    for again in (config, more):
        run(again)
        assert "run stopped after 3 epochs by --patience 2: give more of it, or" in capsys.readouterr().out

    # One that was interrupted counts the epochs before, and one without a summary trains no more.
    run(dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2)), "later")
    run(config, "later")
    (folder / "summary.json").unlink()
    monkeypatch.setattr(experiment.Display, "step", lambda *_: pytest.fail("it trained on"))
    run(more)
    assert json.loads((folder / "summary.json").read_text()) == summary
    chex.assert_trees_all_equal(state_of(folder), state_of(folder.with_name("later")))
    assert json.loads((folder.with_name("later") / "summary.json").read_text())["epochs"] == 3


REFUSALS = {
    "epochs is 0: it must be at least 1": small(0),
    "batch_size 8 is larger than the 5 training": dataclasses.replace(
        small(1), data=dataclasses.replace(small(1).data, train_examples=5)
    ),
    "dataset folder needs data_dir, a folder": dataclasses.replace(
        small(1), data=dataclasses.replace(small(1).data, dataset="folder")
    ),
    "loss has the term 'dice'": small(1, loss="dice"),
    "^train.schedule is 'linear': choose from constant, cosine$": small(1, schedule="linear"),
    "^model.precision is 'float16': choose from auto, float32, bfloat16$": dataclasses.replace(
        small(1), model=ModelConfig(precision="float16")
    ),
    "^train.epochs is 1.5: it must be int$": small(1.5),
    "patience 2 goes by a validation part, and there is none: add validation_fraction": small(1, patience=2),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_is_refused_in_names_and_nothing_is_written(run, tmp_path, message):
    with pytest.raises(InputError, match=message) as error:
        run(REFUSALS[message])
    assert "--" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_flags_become_names_and_file_names_stay():
    with pytest.raises(InputError, match=r"^a--b/--c: try remat, or batch_size 4 or overwrite$"), names_for_flags():
        raise InputError("a--b/--c: try --remat, or --batch-size 4 or --overwrite")


def test_a_thread_trains_too(run):
    results: list[Path] = []
    thread = threading.Thread(target=lambda: results.append(run(small(1), "threaded")))
    thread.start()
    thread.join()
    assert int(state_of(results[0]).step) == 2


def test_in_a_thread_no_signal_is_noticed():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def notice():
        with noticing() as noticed:
            found.append((noticed, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=notice)
    thread.start()
    thread.join()
    assert found == [([], before)]


def test_auto_precision_is_settled_when_a_run_begins_and_kept_when_it_goes_on(tmp_path, monkeypatch, capsys):
    def settled(precision: str, fastest: str, overwrite: bool = False) -> str:
        monkeypatch.setattr(device, "fastest_precision", lambda placement: fastest)
        config = dataclasses.replace(small(1), model=ModelConfig(widths=(4, 4), precision=precision))
        return settle_precision(config, tmp_path, device.placement(), overwrite).model.precision

    def has(precision: str) -> None:
        config = dataclasses.replace(small(1), model=ModelConfig(widths=(4, 4), precision=precision))
        runs.write_json(tmp_path / "config.json", to_dict(config))

    assert [settled("auto", fastest) for fastest in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    assert settled("float32", "bfloat16") == "float32"
    for stored in ("float32", "bfloat16", "auto"):  # auto: of an older version, float32 on a CPU as it was
        has(stored)
        assert [settled("auto", fastest) for fastest in ("float32", "bfloat16")] == [stored, stored]
        # It keeps its precision where that is slow, and says so.
        assert ("bfloat16 is slower than float32 here" in capsys.readouterr().err) == (stored == "bfloat16")
    assert settled("auto", "bfloat16", overwrite=True) == "bfloat16"
    assert not capsys.readouterr().err
    assert settled("bfloat16", "float32") == "bfloat16"
    assert "bfloat16 is slower than float32 here" in capsys.readouterr().err
