"""The report of runs by any framework, the ablation's settings and table, and the time to a quality."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import ablation
import time_to_quality

from unet_jax.commands import report
from unet_jax.commands.evaluate import tables
from unet_jax.commands.train import parse
from unet_jax.config import default_config, to_dict
from unet_jax.errors import InputError


def make_run(
    folder: Path, seed: int, losses: list[float], framework: str | None = None, commit: str | None = None, **train
) -> Path:
    config = default_config("mp_tr_ce", "oxford_iiit_pet")
    config = replace(config, train=replace(config.train, seed=seed, **train))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    environment = {"device": "a card", "git_commit": commit, **({"framework": framework} if framework else {})}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [
        {
            "epoch": i, "train_loss": loss, "test_loss": loss, "mean_iou": 0.5 + seed / 10, "pixel_accuracy": 0.75,
            "iou": {"pet": 0.25, "background": 0.5, "border": None}, "seconds": 10.0 * i, "images_per_second": 100.0,
        }
        for i, loss in enumerate(losses, 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"epochs": len(lines)}))
    return folder


def cell_of(row: str, name: str) -> str:
    return row.strip("| ").split(" | ")[report.HEAD.index(name)]


def test_an_unfinished_run_says_so(tmp_path):
    folder = make_run(tmp_path / "stopped", 0, [0.9, 0.8])
    (folder / "summary.json").unlink()
    assert cell_of(report.row([report.read_run(folder)]), "epochs") == "2 of 25"


def test_a_class_that_a_seed_lacks_is_named_with_its_seeds(tmp_path):
    runs = [report.read_run(make_run(tmp_path / str(seed), seed, [0.5])) for seed in range(3)]
    runs[2].scores["iou"]["border"] = 0.125
    for ordered in (runs, runs[::-1]):
        iou = set(cell_of(report.row(ordered), "IoU by class").split(", "))
        assert iou == {"pet 0.250", "background 0.500", "border 0.125 (1 of 3 seeds)"}


def test_names_that_would_break_a_table(tmp_path):
    run = report.read_run(make_run(tmp_path / "run", 0, [0.5]))
    run.scores["iou"] = {"a|b": 0.25, "c\nd": 0.5}
    (line,) = report.row([run]).splitlines()
    assert cell_of(line, "IoU by class") == "a\\|b 0.250, c d 0.500"
    lines = tables({"iou": run.scores["iou"], "dice": run.scores["iou"]}, np.eye(2, dtype=int), ("a|b", "c\nd"))
    assert {line.replace("\\|", "").count("|") for line in lines.splitlines() if line} == {4, 5}


def test_published_losses_are_those_of_the_same_data_and_loss(tmp_path):
    config = default_config("mp_tr_ce", "oxford_iiit_pet")
    assert min(report.published_losses(config).values()) == 0.5283
    assert not report.published_losses(replace(config, train=replace(config.train, loss="soft_dice")))
    assert not report.published_losses(default_config("mp_tr_ce", "folder"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("environment.json", "[]"),
        ("summary.json", "[]"),
        ("metrics.jsonl", "5\n"),
        ("metrics.jsonl", '{"epoch": 1, "test_loss": 0.5}\n'),
        ("split.json", '{"train": null}'),
        ("split.json", '{"train": ['),
    ],
)
def test_a_damaged_run_is_left_out_and_the_others_reported(tmp_path, capsys, name, text):
    sound, damaged = make_run(tmp_path / "a", 0, [0.5]), make_run(tmp_path / "b", 1, [0.5])
    if name == "summary.json":
        (damaged / "metrics.jsonl").write_text('{"validation_loss": 1, "seconds": 1, "images_per_second": 1}\n')
    (damaged / name).write_text(text)
    found = report.finished_runs([sound, damaged])
    assert list(found) == [sound]
    assert "left out" in capsys.readouterr().err


def test_seeds_make_one_row_and_frameworks_two(tmp_path):
    folders = [make_run(tmp_path / f"ours{seed}", seed, [0.9, 0.4 + seed / 10, 0.5 + seed / 10]) for seed in (0, 2)]
    folders.append(make_run(tmp_path / "theirs", 0, [0.9, 0.7, 0.6], "pytorch"))
    folders.append(make_run(tmp_path / "other", 0, [0.8], weight_decay=0.5))
    report.write_comparison(report.finished_runs(folders), tmp_path / "out", "report")
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    head, _, *rows = (tmp_path / "out" / "report.md").read_text().split("\n\n")[0].splitlines()
    ours, theirs, other = (dict(zip(*(line.strip("| ").split(" | ") for line in (head, r)), strict=True)) for r in rows)
    assert ours == {
        "variant": "mp_tr_ce", "data": "oxford_iiit_pet", "size": "240", "pictures": "all", "epochs": "3",
        "other settings": "-", "framework": "jax", "seeds": "0 2", "runs": "ours0, ours2",
        "published best loss": "0.5283",
        "test loss": "0.6000 (0.5000 to 0.7000)", "best test loss": "0.5000 (0.4000 to 0.6000)",
        "mean IoU": "0.6000 (0.5000 to 0.7000)", "IoU by class": "pet 0.250, background 0.500",
        "pixel accuracy": "0.7500 (0.7500 to 0.7500)", "s / epoch": "20.0 (20.0 to 20.0)",
        "images/s": "100 (100 to 100)", "device": "a card", "commit": "-",
    }  # fmt: skip
    assert (theirs["framework"], theirs["seeds"], theirs["test loss"]) == ("pytorch", "0", "0.6000")
    assert (other["epochs"], other["other settings"]) == ("1", "weight_decay 0.5")


def test_changed_code_and_a_seed_trained_twice_are_rows_of_their_own(tmp_path):
    commit = "0123456789abcdef"
    made = [(0, commit), (1, commit), (1, commit), (0, f"{commit}-dirty"), (0, "fedcba9876543210")]
    runs = [report.read_run(make_run(tmp_path / str(i), seed, [0.5], commit=c)) for i, (seed, c) in enumerate(made)]
    _, _, *rows = report.table(runs).splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    seeds = report.HEAD.index("seeds")
    assert [(c[seeds], c[-1]) for c in cells] == [
        ("0 1", "0123456"),
        ("1", "0123456"),
        ("0", "0123456-dirty"),
        ("0", "fedcba9"),
    ]


def test_a_run_made_by_several_commits_names_them_all(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed, [0.5], commit="a" * 40) for seed in range(4)]
    changes = [{"git_commit": "b" * 40}, {"git_commit": "b" * 40}, {"device": "b card"}]
    for folder, changed in zip(folders[1:], changes, strict=True):
        file = folder / "environment.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "resumed": [{"after_epoch": 1, **changed}]}))
    cells = [row.strip("| ").split(" | ") for row in report.table(map(report.read_run, folders)).splitlines()[2:]]
    assert [(c[report.HEAD.index("seeds")], *c[-2:]) for c in cells] == [
        ("0", "a card", "aaaaaaa"),
        ("1 2", "a card", "aaaaaaa, bbbbbbb"),
        ("3", "a card, b card", "aaaaaaa"),
    ]


def test_a_run_with_validation_counts_by_its_summary(tmp_path):
    folder = make_run(tmp_path / "run", 0, [0.5])
    record = json.loads((folder / "metrics.jsonl").read_text())
    names = {"epoch", "train_loss", "seconds", "images_per_second"}
    held_out = {k if k in names else f"validation_{k.removeprefix('test_')}": v for k, v in record.items()}
    (folder / "metrics.jsonl").write_text(json.dumps(held_out))
    (folder / "summary.json").unlink()
    with pytest.raises(InputError, match=r"run is no finished run: it has no summary\.json$"):
        report.read_run(folder)
    (folder / "summary.json").write_text(json.dumps({"test": {**record, "test_loss": 0.25}}))
    report.write_comparison(report.finished_runs([folder]), name="report")
    row = (tmp_path / "report.md").read_text().splitlines()[2]
    assert "| 0.2500 | - | 0.5000 |" in row  # no best test loss: it was looked at once

    (folder / "summary.json").write_text(json.dumps({"epochs": 2}))
    with pytest.raises(InputError, match=r"it has gone on since its summary\.json was written$"):
        report.read_run(folder)

    (folder / "summary.json").write_text("{}")  # there was no test
    config = json.loads((folder / "config.json").read_text())
    config["data"]["dataset"] = "folder"
    (folder / "config.json").write_text(json.dumps(config))
    report.write_comparison(report.finished_runs([folder]), name="report")
    row = (tmp_path / "report.md").read_text().splitlines()[2]
    assert "| - | 0.5000 (validation) | - | 0.5000 (validation) |" in row  # and nothing published of these pictures


def test_runs_of_one_name_both_count(tmp_path, capsys):
    folders = [make_run(tmp_path / project / "runs" / "mine", seed, [0.5]) for seed, project in enumerate("ab")]
    report.write_comparison(report.finished_runs(folders), tmp_path)
    assert "| 0 1 |" in capsys.readouterr().out


def test_a_run_without_a_finished_epoch_is_refused_as_such(tmp_path):
    folder = make_run(tmp_path / "run", 0, [])
    with pytest.raises(InputError, match=r"run has no finished epoch$"):
        report.read_run(folder)


def test_runs_tested_on_fewer_pictures_say_so(tmp_path):
    folders = [make_run(tmp_path / name, 0, [0.5]) for name in ("all", "fewer")]
    config = json.loads((folders[1] / "config.json").read_text())
    config["data"]["test_examples"] = 4
    (folders[1] / "config.json").write_text(json.dumps(config))
    _, _, *rows = report.table(map(report.read_run, folders)).splitlines()
    assert [row.split(" | ")[5] for row in rows] == ["-", "test_examples 4"]


def test_a_folder_of_pictures_whose_name_is_not_utf8(tmp_path):
    folder = make_run(tmp_path / "run", 0, [0.5])
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"dataset": "folder", "data_dir": "/caf\udce9"}
    (folder / "config.json").write_text(json.dumps(config))
    report.write_comparison(report.finished_runs([folder]), tmp_path)
    assert b"folder caf\xe9 |" in (tmp_path / "comparison.md").read_bytes()


def test_runs_on_other_pictures_are_rows_of_their_own(tmp_path):
    folders = [make_run(tmp_path / f"run{seed}", seed, [0.5]) for seed in range(6)]
    given = [("pictures/X", "a"), ("pictures/Y", "a"), ("pictures/X", "a"), ("pictures/X", "b"), ("other/X", "a")]
    given += [("X", "a")]  # that of the first, by the way from the run's folder
    for folder, (data, names) in zip(folders, given, strict=True):
        config = json.loads((folder / "config.json").read_text())
        config["data"] |= {"dataset": "folder", "data_dir": str(tmp_path / data) if "/" in data else data}
        (folder / "config.json").write_text(json.dumps(config))
        if "/" not in data:
            environment = json.loads((folder / "environment.json").read_text())
            (folder / "environment.json").write_text(json.dumps({**environment, "data_dir": "../pictures/X"}))
        (folder / "split.json").write_text(json.dumps({"train": [names], "test": ["z"]}))
    rows = report.table(map(report.read_run, folders)).splitlines()[2:]
    assert [(row.split(" | ")[1], row.split(" | ")[7]) for row in rows] == [
        ("folder X", "0 2 5"),
        ("folder Y", "1"),
        ("folder X", "3"),
        ("folder X", "4"),
    ]


def test_pictures_that_the_first_weights_have_seen_are_told_beside_the_scores(tmp_path):
    first = make_run(tmp_path / "first", 0, [0.5])
    (first / "split.json").write_text(json.dumps({"train": ["a", "b"], "test": ["c"]}))
    second = make_run(tmp_path / "second", 0, [0.5], init_from=str(first))
    (second / "split.json").write_text(json.dumps({"train": ["c"], "test": ["a", "b", "d"]}))
    rows = report.table(map(report.read_run, (first, second))).splitlines()[2:]
    assert [cell_of(row, "runs") for row in rows] == ["first", "second"]
    assert ["has seen" in row for row in rows] == [False, True]
    assert cell_of(rows[1], "other settings").endswith("; init_from has seen 2 of its test pictures")


def test_what_is_no_finished_run_is_left_out_and_runs_within_a_folder_are_found(tmp_path, capsys):
    make_run(tmp_path / "runs" / "all" / "one", 0, [0.5])
    make_run(tmp_path / "runs" / "all" / "two", 1, [0.5])
    make_run(tmp_path / "runs" / "begun", 0, [])
    (tmp_path / "runs" / "masks").mkdir()
    older = make_run(tmp_path / "runs" / "older", 0, [0.5])
    (older / "config.json").write_text("[]")
    paths = [str(path) for path in sorted((tmp_path / "runs").iterdir())]
    report.command([*paths, "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert "| 0 1 |" in said.out
    assert [line.partition(str(tmp_path))[0] for line in said.err.splitlines()] == ["left out: "] * 3
    with pytest.raises(SystemExit) as ended:
        report.command([str(tmp_path / "runs" / "begun"), "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "begun has no finished epoch" in capsys.readouterr().err


def test_ablation_settings_are_flags_of_run_py():
    def config(setting):
        return parse([*ablation.BASE.split(), *ablation.flags(setting), "--dataset", "synthetic"])[0].config

    configs = {piece: config(piece) for piece in ("base", *ablation.PIECES)}
    assert all(config.data.validation_fraction == 0.1 for config in configs.values())
    assert len(set(configs.values())) == 1 + len(ablation.PIECES)
    both = config("strong+cosine").train
    assert both == replace(configs["strong"].train, schedule="cosine", warmup_epochs=1)
    with pytest.raises(InputError, match="has the piece 'cosin': choose from base, basic, "):
        ablation.flags("basic+cosin")
    with pytest.raises(InputError, match="ce\\+dice has two pieces that set --loss: only one of them would count"):
        ablation.flags("basic+ce+dice")


def test_ablation_refuses_runs_of_other_lengths_and_lets_pieces_count(tmp_path, monkeypatch):
    started = []

    def run(command):
        started.append(parse(command[2:])[0].config)
        folder = Path(command[command.index("--workdir") + 1])
        make_run(folder, 0, [0.5], epochs=len(started))
        file = folder / "metrics.jsonl"
        file.write_text(file.read_text().replace('"mean_iou"', '"validation_mean_iou"'))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    settings = ["ablation.py", "base", "dice", "--dataset", "synthetic", "--loss", "cross_entropy"]
    monkeypatch.setattr(sys, "argv", [*settings, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="dice-0 has 1 epochs for 2"):
        ablation.main()
    assert [config.train.loss for config in started] == ["cross_entropy", "soft_dice"]


def test_ablation_table_pairs_seeds():
    scores = {"base": (0.5, 0.6), "ema": (0.45, 0.58)}
    results = {name: {seed: ablation.Trained(s, 2 + seed) for seed, s in enumerate(v)} for name, v in scores.items()}
    minutes = "2.5 (2.0 to 3.0)"
    assert ablation.table(results).splitlines()[2:] == [
        f"| base | 2 | 0.5500 (0.5000 to 0.6000) | +0.0000 (+0.0000 to +0.0000) | {minutes} |",
        f"| ema | 2 | 0.5150 (0.4500 to 0.5800) | -0.0350 (-0.0500 to -0.0200) | {minutes} |",
    ]


def test_time_to_quality_counts_the_run_that_another_began_from(tmp_path, monkeypatch, capsys):
    first = make_run(tmp_path / "first", 1, [0.9, 0.8])  # epochs of 10 and 20 s
    make_run(tmp_path / "second", 2, [0.7, 0.6], init_from=str(first))
    command = ["time_to_quality.py", str(tmp_path / "second"), str(first), "--levels", ".6", ".65", ".75"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out")])
    time_to_quality.main()
    assert (tmp_path / "out" / "time_to_quality.md").read_text().splitlines()[2:] == [
        f"| {tmp_path.name}/second | test | 0.7 | 0.7 | - | 0.7000 | 1.0 |",
        f"| {tmp_path.name}/first | test | 0.2 | - | - | 0.6000 | 0.5 |",
    ]
    assert (tmp_path / "out" / "time_to_quality.png").read_bytes()[:4] == b"\x89PNG"
    assert not capsys.readouterr().err
    time_to_quality.curves([tmp_path / "second"])
    assert "counts its own minutes alone: name that one, too" in capsys.readouterr().err
    record = {"epoch": 1, "train_loss": 0.5, "seconds": 10.0, "images_per_second": 1.0}
    (first / "metrics.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"first has no mean IoU: it had neither a test split nor a validation part$"):
        time_to_quality.curves([first])


def test_what_a_folder_decides_is_no_other_setting():
    folder = default_config("mp_tr_ce", "folder")
    filled = replace(folder, data=replace(folder.data, class_names=("a", "b"), white=65535))
    assert report.settings(replace(filled, train=replace(folder.train, batch_size=16))) == "-"
    tiles = replace(filled, data=replace(filled.data, tiles=True, scale=(1.0, 1.0)))
    assert report.settings(replace(tiles, train=replace(folder.train, batch_size=4))) == "tiles True, batch_size 4"
