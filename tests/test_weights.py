import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_predict import make_run, picture

from unet_jax import device, experiment, runs
from unet_jax.commands import evaluate, predict
from unet_jax.commands.export import command as export
from unet_jax.config import default_config, from_dict, to_dict
from unet_jax.errors import InputError
from unet_jax.predict import load


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, and its weights alone."""
    folder = tmp_path_factory.mktemp("weights")
    run, out = make_run(folder / "run"), folder / "out"
    export([str(run), "--out", str(out), "--format", "weights"])
    return run, out


def test_they_are_the_runs_rounded_to_bfloat16(folders):
    run, out = (runs.load(folder, device.placement())[1].state for folder in folders)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(run.params), jax.tree.leaves(out.params), strict=True
    ):
        assert theirs.dtype == jnp.float32
        expected = ours.astype(jnp.bfloat16).astype(jnp.float32) if ours.ndim > 1 else ours
        np.testing.assert_array_equal(theirs, expected, err_msg=str(path))
    jax.tree.map(np.testing.assert_array_equal, run.batch_stats, out.batch_stats)


def test_the_folder_is_small_and_its_network_answers_as_the_run_does(folders):
    run, out = folders
    parameters = sum(x.size for x in jax.tree.leaves(load(run).restored.state.params))
    assert sum(file.stat().st_size for file in out.glob("*.msgpack")) < 2.5 * parameters + 4000
    assert {file.name for file in out.iterdir()} == {"config.json", "model.json", "weights.msgpack"}
    images = [picture(40, 56, seed) for seed in range(3)]
    description = json.loads((out / "model.json").read_text())
    assert description["input"]["shape"] == ["height", "width", 3]
    answers = []
    for image in images:
        names = {"image": image}
        exec("\n".join(description["usage"]).replace('"."', repr(str(out))), names)
        answers.append(names["labels"])
    assert description["output"] == {"name": "labels", "dtype": "uint8", "shape": ["height", "width"]}
    assert {(a.dtype.name, a.shape) for a in answers} == {("uint8", (40, 56))}
    expected = load(run)(images)
    same = [np.mean(a == b) for a, b in zip(answers, expected, strict=True)]
    assert min(same) > 0.97
    assert all(len(np.unique(labels)) > 1 for labels in expected)


def test_another_export_into_the_folder_is_refused(folders, capsys):
    run, out = folders
    before = load(out)(picture(40, 56, 0))
    with pytest.raises(SystemExit) as ended:
        export([str(run), "--out", str(out)])
    assert ended.value.code == 2
    assert "holds another export, weights.msgpack: choose another folder" in capsys.readouterr().err
    export([str(run), "--out", str(out), "--format", "weights"])
    np.testing.assert_array_equal(load(out)(picture(40, 56, 0)), before)


def test_commands_take_the_folder_for_a_run(folders, tmp_path, capsys):
    _, out = folders
    Image.fromarray(picture(40, 56)).save(tmp_path / "photo.png")
    with pytest.raises(SystemExit) as end:
        predict.command([str(out), str(tmp_path / "photo.png"), "--out", str(tmp_path / "masks")])
    assert not end.value.code
    assert (tmp_path / "masks" / "photo_mask.png").exists()
    evaluate.command([str(out), "--examples", "8", "--out", str(tmp_path / "scores")])
    assert json.loads((tmp_path / "scores" / "evaluation.json").read_text())["pictures"] == 8
    printed = capsys.readouterr().out
    assert "1 picture in " in printed
    assert ", step 1, " in printed
    assert "split.json" not in printed  # the splits of synthetic pets are known


def test_training_starts_from_them(folders, tmp_path):
    _, out = folders
    given = to_dict(runs.read_config(out))
    given["train"] |= {"init_from": str(out), "epochs": 1, "batch_size": 4, "learning_rate": 1e-6}
    given["data"] |= {"train_examples": 4, "test_examples": 4}
    experiment.run(from_dict(given), tmp_path / "run", cache_dir=tmp_path / "cache", compilation_cache=False)
    theirs, trained = (runs.load(f, device.placement())[1].state.params for f in (out, tmp_path / "run"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), theirs, trained)


def test_weights_that_do_not_fit_are_refused_in_a_line(folders, tmp_path):
    run, out = folders
    config, content = json.loads((out / "config.json").read_text()), (out / "weights.msgpack").read_bytes()
    config["model"]["widths"] = [4, 8, 4]
    for name, config_there, bytes_there in (
        ("widths", config, content),
        ("cut", to_dict(runs.read_config(out)), content[:-100]),
        ("empty", to_dict(runs.read_config(out)), b""),
        ("other", to_dict(default_config("strconv_tr_ce", "synthetic")), content),
    ):
        folder = tmp_path / name
        folder.mkdir()
        runs.write_json(folder / "config.json", config_there)
        (folder / "weights.msgpack").write_bytes(bytes_there)
        with pytest.raises(InputError, match=r"weights\.msgpack cannot be used with its config\.json \(.+\)$"):
            load(folder)
    shutil.copytree(out, tmp_path / "changed")
    (tmp_path / "changed" / "weights.msgpack").write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    with pytest.raises(InputError, match=r"its bytes are not those that model\.json describes"):
        load(tmp_path / "changed")
    with pytest.raises(SystemExit):
        export([str(run), "--out", str(run), "--format", "weights"])
    assert not (run / "weights.msgpack").exists()
