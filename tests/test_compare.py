"""Comparing evaluations: what is one recipe, what its row and curve are, and what is refused."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from claims import assert_names
from matplotlib.figure import Figure
from scripts import refusal, run_main

from early_exit import compare
from early_exit.config import Config, to_dict
from early_exit.latency import Spread, Timing
from early_exit.labels import labelled
from early_exit.recipes import Value, group, read
from early_exit.report import CurvePoint, Cuts, ExitRow, Report

PLAIN_MACS = 20_000_000
LABELS = ("network", "other")


def point(accuracy: float, share: float) -> dict:
    """An outcome on a sample, as a report has it."""
    return {"accuracy": accuracy, "macs_share": share}


def report(accuracy=0.9, share=0.5, final=0.95, alone=(0.6,), curve=None, **changes) -> dict:
    """The part of a report that a comparison reads: early exits a, b, ... and a curve of outcomes
    (share of MACs, accuracy)."""
    names = [*"abcdef"[: len(alone)], "final"]
    curve = curve or [(1.0, final), (0.2, alone[0] if alone else final)]
    return {
        "run": "run", "dataset": "shapes", "arch": "resnet20", "regime": "joint",
        "chosen_by": "budget 50 % of MACs", "criterion": "max_prob", "calibrated": True,
        "val_from": "held out from train", "plain_macs": PLAIN_MACS,
        "device": "a CPU", "precision": "float32",
        "test": point(accuracy, share), "final_accuracy": final, "cuts": None, "timing": [],
        "exits": [{"name": name, "accuracy": right}
                  for name, right in zip(names, [*alone, final], strict=True)],
        "curve": [{"test": point(right, share)} for share, right in curve],
        **changes,
    }


@pytest.fixture
def run(tmp_path):
    """Writes a run with an evaluation; settings are nested in sections."""

    def write(name, seed=0, evaluation="budget-50", settings=None, **values) -> Path:
        directory = tmp_path / "runs" / name
        config = to_dict(Config())
        for section, changed in {"run": {"seed": seed}, **(settings or {})}.items():
            config[section] |= changed
        config["run"]["seed"] = seed
        place = directory / "eval" / evaluation
        place.mkdir(parents=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        (place / "report.json").write_text(json.dumps(report(**values)))
        return directory

    return write


@pytest.fixture
def compared(monkeypatch, capsys):
    """Runs the command line: exit code, output and the one line of an error."""

    def call(*arguments):
        return run_main(compare.main, "early_exit.compare", monkeypatch, capsys, *arguments)

    return call


def rows(*runs: Path, each: bool = False, labels=None):
    """The labelled recipes of all evaluations of some runs."""
    reports = [path for run in runs for path in compare.find(run, ())]
    return labelled(group([read(path) for path in reports], each), labels)


def seeds(run, **values) -> list[Path]:
    """Three seeds, right for 90, 92 and 94 % at 50, 60 and 70 % of the MACs."""
    found = zip((0.90, 0.92, 0.94), (0.5, 0.6, 0.7), strict=True)
    return [run(f"net-{seed}", seed, accuracy=accuracy, share=share, **values)
            for seed, (accuracy, share) in enumerate(found)]


# What is one recipe.


def test_seeds_of_a_recipe_are_one_row_with_mean_and_deviation(run):
    [row] = rows(*seeds(run))
    assert len(row.members) == 3
    assert dataclasses.astuple(row.accuracy()) == pytest.approx((0.92, 0.02))
    assert dataclasses.astuple(row.share()) == pytest.approx((0.6, 0.1))
    assert dataclasses.astuple(row.macs()) == pytest.approx((12e6, 2e6))
    assert dataclasses.astuple(row.final()) == pytest.approx((0.95, 0.0))
    assert row.name == "net"


def test_one_seed_has_no_deviation(run):
    [row] = rows(run("net"))
    assert row.accuracy() == Value(0.9, None)


def test_settings_that_do_not_bear_on_the_result_do_not_split_a_recipe(run):
    machine = {"device": "cuda", "threads": 3, "compile": True, "save_every": 5, "print_freq": 7}
    [row] = rows(
        run("a", 0, settings={"loss": {"weights": None}, "data": {"root": "/here"}}),
        run("b", 1, settings={"loss": {"weights": [1.0, 1.0]}, "run": machine}),
    )
    assert len(row.members) == 2


def test_a_run_from_before_a_setting_had_its_default(run):
    new, old = run("a", 0), run("b", 1)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["optim"]["ema"], config["run"]["sync_bn"]
    config["model"]["head"] = "conv"
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(rows(new, old)) == 1


def test_loss_weights_that_a_plain_network_has_no_use_for(run):
    weights = {"loss": {"weights": [0.3, 0.3, 1.0]}}
    (row,) = rows(run("plain", settings=weights, alone=()))
    assert row.plain


def test_another_setting_evaluation_goal_or_split_is_another_recipe(run):
    base, other = run("a", 0), {"split_seed": 1}
    assert len(rows(base, run("b", 1, settings={"optim": {"lr": 0.2}}))) == 2
    assert len(rows(base, run("c", 1, evaluation="other"))) == 2
    assert len(rows(base, run("d", 1, chosen_by="budget 40 % of MACs"))) == 2
    assert len(rows(base, run("e", 1, settings={"data": other}))) == 2
    assert len(rows(base, run("f", 1, val_from="half of the official test set"))) == 2
    faster = rows(base, run("g", 1, precision="bfloat16"))
    for row, values in zip(faster, ((0, "float32"), (1, "bfloat16")), strict=True):
        assert_names(row.label, *values)


def test_two_runs_of_the_same_seed_are_not_two_seeds(run):
    found = rows(run("first", 0), run("again", 0), run("other", 1))
    assert [row.name for row in found[:2]] == ["first", "again"]
    assert_names(found[2].name, 1)


def test_each_shows_seeds_one_by_one(run):
    found = rows(*seeds(run), each=True)
    assert [row.accuracy().mean for row in found] == [0.90, 0.92, 0.94]
    for seed, row in enumerate(found):
        assert_names(row.name, seed)


def test_reports_without_their_runs_are_rows_of_their_own(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report()))
    assert [row.name for row in rows(tmp_path / "a", tmp_path / "b")] == ["a", "b"]


# What a row is called.


def test_a_row_is_called_by_what_sets_it_apart(run):
    found = rows(
        run("a", settings={"model": {"arch": "resnet20"}}),
        run("b", settings={"model": {"arch": "resnet20"}, "run": {"regime": "mixed"}}),
        run("c", settings={"model": {"arch": "resnet56"}}, alone=(0.5, 0.6)),
        run("d", settings={"model": {"arch": "resnet20"}}, alone=()),
    )
    assert [row.name for row in found] == [
        "resnet20, joint", "resnet20, mixed", "resnet56", "resnet20, plain"
    ]


@pytest.mark.parametrize(("setting", "values"), [
    ({"optim": {"epochs": 30}}, [200, 30]),
    ({"model": {"head": ["linear"]}}, ["conv", "linear"]),
    ({"loss": {"weights": [0.3, 1.0]}}, ["1 1", "0.3 1"]),
    ({"optim": {"weight_decay": 5e-4}}, [0.0001, 0.0005]),
])
def test_a_setting_is_said_in_words(run, setting, values):
    for row, value in zip(rows(run("a"), run("b", settings=setting)), values, strict=True):
        assert_names(row.name, value)


def test_goals_are_told_apart_in_the_label_and_the_criterion_where_it_differs(run):
    directory = run("net", evaluation="a", chosen_by="budget 50 % of MACs")
    run_again = report(chosen_by="max drop 1 points", criterion="entropy", calibrated=False)
    (directory / "eval" / "b").mkdir()
    (directory / "eval" / "b" / "report.json").write_text(json.dumps(run_again))
    found = rows(directory)
    assert [row.name for row in found] == ["net", "net"]
    assert_names(found[0].label, "net", "budget 50 % of MACs")
    assert "max_prob" not in found[0].label and "temperature" not in found[0].label
    assert_names(found[1].label, "net", "max drop 1 points", "entropy")
    assert "temperature" in found[1].label


def test_labels_are_given_in_order(run, compared, tmp_path):
    one, two = run("a"), run("b", settings={"optim": {"epochs": 3}})
    code, out, _ = compared(one, two, "--labels", *LABELS, "--out", tmp_path / "out", "--no-plots")
    assert code == 0
    assert [line.split(" | ")[0] for line in out.splitlines()[2:4]] == ["| network", "| other"]
    message = refusal(compare.main, [str(one), str(two), "--labels", "one"])
    assert_names(message, "--labels", 1, 2, *(row.label for row in rows(one, two)))


def test_the_picture_names_whatever_the_labels_are(run, tmp_path, monkeypatch):
    one, two = run("a"), run("b", settings={"optim": {"epochs": 3}})
    labels = [r"_\frac $x$", "$x_"]  # neither is mathematics that matplotlib can set
    named = []
    savefig = Figure.savefig

    def read_names(figure, *args, **kwargs):
        named.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", read_names)
    out = tmp_path / "out"
    compare.main([str(one), str(two), "--labels", *labels, "--out", str(out)])
    assert [name.strip() for name in named[:2]] == labels


def test_a_label_does_not_tear_the_table(run, compared, tmp_path):
    one, two = run("a"), run("b", settings={"optim": {"epochs": 3}})
    labels = ("a | b", "two\nlines")
    code, out, _ = compared(one, two, "--labels", *labels, "--out", tmp_path / "out", "--no-plots")
    assert code == 0
    head, _, *rows = out.splitlines()[:4]
    assert rows[0].startswith(r"| a \| b | 1 |") and rows[1].startswith("| two lines | 1 |")
    assert [row.replace(r"\|", "").count("|") for row in rows] == [head.count("|")] * 2
    said = json.loads((tmp_path / "out" / "table.json").read_text())
    assert "a | b" in json.dumps(said)


# The curve.


def test_the_band_is_read_at_common_macs_by_linear_interpolation(run):
    [row] = rows(
        run("a-0", 0, curve=[(1.0, 0.9), (0.2, 0.5)]), run("a-1", 1, curve=[(1.0, 0.8), (0.4, 0.6)])
    )
    macs, mean, std = row.curve()
    assert (macs[0], macs[-1]) == (0.4 * PLAIN_MACS, PLAIN_MACS)
    # at 0.4: 0.6 and 0.6; halfway, at 0.7: 0.75 and 0.7; at 1: 0.9 and 0.8
    assert np.interp(0.7 * PLAIN_MACS, macs, mean) == pytest.approx(0.725)
    assert (mean[0], mean[-1]) == pytest.approx((0.6, 0.85))
    assert (std[0], std[-1]) == pytest.approx((0.0, 0.1 / 2**0.5), abs=1e-12)


def test_curves_that_share_no_macs_have_no_mean(run):
    [row] = rows(run("a-0", 0, curve=[(0.3, 0.5)]), run("a-1", 1, curve=[(0.4, 0.5)]))
    assert [len(part) for part in row.curve()] == [0, 0, 0]


# The table.


def cells(recipes) -> list[list[str]]:
    """The cells of the Markdown table, heads first."""
    lines = compare.table(recipes).splitlines()
    return [line.strip("| ").split(" | ") for line in (lines[0], *lines[2:])]


def timing(size: int, plain: float, live: float) -> dict:
    """Seconds of the plain network and with exits."""
    return {"batch_size": size, "plain": {"total": plain}, "live": {"total": live}}


def test_the_table(run):
    heads, row, single = cells(rows(
        *seeds(run, timing=[timing(8, 3.0, 2.0)]), run("one", settings={"optim": {"epochs": 3}})
    ))
    assert len(heads) == len(row)
    assert_names(heads[3], "a")
    assert_names(heads[-1], 8)  # the batch size of the speed-up
    assert_names(row[0], 200)
    assert row[1:] == [
        "3", "budget 50 % of MACs", "60.00 ± 0.00 %", "95.00 ± 0.00 %", "92.00 ± 2.00 %",
        "60.0 ± 10.0 %", "12.00 ± 2.00", "1.50 ± 0.00 x",
    ]
    assert_names(single[0], 3)
    assert single[1:] == [
        "1", "budget 50 % of MACs", "60.00 %", "95.00 %", "90.00 %", "50.0 %", "10.00", "-",
    ]


def test_exits_alone_are_shown_where_the_rows_have_as_many(run):
    one, other = run("a"), run("b", exits=[
        {"name": name, "accuracy": 0.7} for name in ("early", "final")
    ])
    three = run("c", alone=(0.5, 0.6, 0.7))
    heads, row, _ = cells(rows(one, other))
    assert_names(heads[3], 1)
    assert row[3] == "60.00 %"
    assert cells(rows(one, three))[1][3] == "95.00 %"  # the final exit's


def test_a_plain_network_is_a_row_and_a_point(run, compared, tmp_path):
    plain = run("plain", alone=(), accuracy=0.93, share=1.0, final=0.93, evaluation="plain")
    heads, row, _ = cells(rows(plain, run("exits")))
    assert_names(heads[3], "a")
    assert row == ["plain", "1", "-", "-", "93.00 %", "93.00 %", "100.0 %", "20.00"]
    assert compared(plain, tmp_path / "runs" / "exits", "--out", tmp_path / "out")[0] == 0


def test_of_cuts_mean_and_deviation_are_shown(run):
    cuts = {"count": 10, "accuracy": {"mean": 0.91, "std": 0.01},
            "macs_share": {"mean": 0.4, "std": 0.02}, "final_accuracy": {"mean": 0.94, "std": 0.0}}
    recipes = rows(run("net", cuts=cuts))
    row = cells(recipes)[1]
    assert_names(row[1], 1, 10)
    assert row[2:] == [
        "budget 50 % of MACs", "60.00 %", "94.00 ± 0.00 %", "91.00 ± 1.00 %",
        "40.0 ± 2.0 %", "8.00 ± 0.40",
    ]
    assert any("±" in said and "cut" in said for said in compare.notes(recipes))


def test_seeds_of_cuts_vary_over_seeds(run):
    def cuts(accuracy):
        spread = {"mean": accuracy, "std": 0.5}
        return {"count": 3, "accuracy": spread, "macs_share": spread, "final_accuracy": spread}

    recipes = rows(run("a-0", 0, cuts=cuts(0.90)), run("a-1", 1, cuts=cuts(0.92)))
    assert dataclasses.astuple(recipes[0].accuracy()) == pytest.approx((0.91, 0.02 / 2**0.5))
    notes = compare.notes(recipes)
    assert any(all(word in said for word in ("±", "seed", "cut")) for said in notes)


def test_what_the_numbers_are_worth_is_said(run):
    several = compare.notes(rows(*seeds(run)))
    assert any("±" in said and "seed" in said for said in several)
    assert not any("±" not in said and "seed" in said for said in several)  # as of one seed
    other = run("b", val_from="half of test", settings={"optim": {"lr": 0.3}})
    mixed = compare.notes(rows(run("a"), other))
    assert any("±" not in said and "seed" in said for said in mixed)
    (split,) = [said for said in mixed if "half of test" in said]
    assert_names(split, 0.3, "held out from train")
    assert any("optim.lr" in said for said in mixed)


# The files.


def test_the_files_hold_the_numbers_and_the_picture(run, compared, tmp_path):
    others = run("b", settings={"optim": {"epochs": 3}})
    code, out, err = compared(*seeds(run), others)
    (place,) = (tmp_path / "runs" / "compare").iterdir()
    assert_names(place.name.replace("-", " "), 200, 3)
    assert (code, err) == (0, "") and str(place) in out
    assert sorted(path.name for path in place.iterdir()) == sorted(compare.FILES)
    assert (place / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    with (place / "table.csv").open() as file:
        first, second = csv.DictReader(file)
    assert_names(first["recipe"], 200)
    assert first["seeds"] == "3"
    assert float(first["chosen_point_percent_mean"]) == pytest.approx(92)
    assert float(first["chosen_point_percent_std"]) == pytest.approx(2)
    assert float(first["macs_millions_mean"]) == pytest.approx(12)
    assert second["macs_percent_of_plain_mean"] == "50.0"
    assert second["macs_percent_of_plain_std"] == ""

    found = json.loads((place / "table.json").read_text())
    first, second = found["recipes"]
    assert first["accuracy"] == pytest.approx({"mean": 0.92, "std": 0.02})
    assert second["accuracy"] == {"mean": 0.9, "std": None}
    assert [one["seed"] for one in first["evaluations"]] == [0, 1, 2]
    assert first["evaluations"][0]["run"] == str(tmp_path / "runs" / "net-0")
    assert first["evaluations"][0]["evaluation"] == "budget-50"
    assert first["alone"]["a"]["mean"] == pytest.approx(0.6)
    assert (second["curve"]["mean"], second["curve"]["std"]) == ([0.6, 0.95], None)
    assert first["curve"]["std"] == pytest.approx([0.0] * 200)

    page = (place / "table.md").read_text()
    assert compare.table(rows(*(tmp_path / "runs" / f"net-{i}" for i in range(3)), others)) in page
    assert "python -m early_exit.compare " in page


def test_an_earlier_comparison_is_replaced_and_nothing_else(run, compared, tmp_path):
    directory, out = run("a"), tmp_path / "out"
    assert compared(directory, "--out", out)[0] == 0
    assert compared(directory, "--out", out, "--no-plots")[0] == 0
    assert not (out / "curves.png").exists()
    code, _, err = compared(directory, "--out", directory)
    assert code == 2
    assert_names(err, directory, "--out")
    assert (directory / "config.yaml").exists()


def test_nothing_is_left_of_a_comparison_that_fails(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "draw", full)
    message = refusal(compare.main, [str(run("a")), "--out", str(tmp_path / "out")])
    assert "No space left" in message
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_long_name_is_cut(run):
    recipes = rows(*(run(f"r{i}", settings={"optim": {"lr": 0.001 * i}}) for i in range(1, 20)))
    assert len(compare.directory_of(recipes).name) <= 80


@pytest.mark.parametrize("number", [1, 8])
def test_the_picture_of_many(run, compared, tmp_path, number):
    runs = [run(f"r{i}", settings={"optim": {"lr": 0.01 * (i + 1)}}) for i in range(number)]
    assert compared(*runs, "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_from_another_working_directory(run, tmp_path):
    run("a"), run("b", settings={"optim": {"epochs": 3}})
    done = subprocess.run(
        [sys.executable, "-m", "early_exit.compare", "runs/a", "runs/b", "--no-plots"],
        cwd=tmp_path, capture_output=True, text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_names(done.stdout, 200, 3)  # the epochs
    assert len([*(tmp_path / "runs" / "compare").glob("*200*3*/table.md")]) == 1


# What a RUN may be, and what is refused.


def test_a_run_an_evaluation_or_a_report(run):
    directory = run("net", evaluation="a")
    for place in (directory, directory / "eval" / "a", directory / "eval" / "a" / "report.json"):
        assert compare.find(place, ()) == [directory / "eval" / "a" / "report.json"]


def test_evaluations_are_taken_by_name_in_the_order_asked_for(run):
    directory = run("net", evaluation="a")
    for name in ("b", "c", ".d.partial"):
        (directory / "eval" / name).mkdir()
        (directory / "eval" / name / "report.json").write_text(json.dumps(report()))
    assert [path.parent.name for path in compare.find(directory, ())] == ["a", "b", "c"]
    assert [path.parent.name for path in compare.find(directory, ("c", "a"))] == ["c", "a"]
    assert_names(refusal(compare.find, directory, ("e",)), directory, "e", "a", "b", "c")


def test_the_same_evaluation_twice_is_one_row(run, compared, tmp_path):
    directory = run("net")
    code, out, _ = compared(
        directory, directory / "eval" / "budget-50", "--out", tmp_path / "out", "--no-plots"
    )
    assert code == 0 and out.count("| net |") == 1


def test_a_run_without_evaluation_is_told_the_command(tmp_path):
    (tmp_path / "versions.json").write_text(json.dumps({"command": ["folder/trainer.py", "-b"]}))
    assert f"python folder/eval.py {tmp_path}" in refusal(compare.find, tmp_path, ())
    (tmp_path / "versions.json").unlink()
    assert f"python eval.py {tmp_path}" in refusal(compare.find, tmp_path, ())
    assert_names(refusal(compare.find, tmp_path / "absent", ()), tmp_path / "absent")


@pytest.mark.parametrize("text", ["", '{"run": "torn', '{"test": NaN}', "[]", "7", "\xff"])
def test_a_torn_or_foreign_report_is_named(run, text):
    path = run("net") / "eval" / "budget-50" / "report.json"
    path.write_bytes(text.encode("latin-1"))
    message = refusal(read, path)
    assert_names(message, path, "eval.py")


@pytest.mark.parametrize("field", ["exits", "curve", "test", "plain_macs", "dataset", "chosen_by"])
def test_a_report_of_another_version_is_named_with_what_it_lacks(run, field):
    path = run("net") / "eval" / "budget-50" / "report.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != field}))
    message = refusal(read, path)
    assert_names(message, path, f"'{field}'", "eval.py")
    path.write_text(json.dumps({**values, field: None if field != "dataset" else 1}))
    if field not in ("dataset", "chosen_by"):
        assert str(path) in refusal(read, path)


def test_an_older_report_needs_no_more_than_what_is_read(run):
    path = run("net") / "eval" / "budget-50" / "report.json"
    values = json.loads(path.read_text())
    for field in ("criterion", "calibrated", "cuts", "timing", "device", "run"):
        del values[field]
    path.write_text(json.dumps(values))
    assert read(path).accuracy == Value(0.9)


def test_what_is_read_is_what_a_report_has():
    holds = {
        Report: report().keys(), ExitRow: ("name", "accuracy"), CurvePoint: ("test",),
        Cuts: ("count", "accuracy", "macs_share", "final_accuracy"), Spread: ("total",),
        Timing: ("batch_size", "plain", "live"),
    }
    for kind, names in holds.items():
        assert set(names) <= {field.name for field in dataclasses.fields(kind)}


def test_mistakes_end_in_one_line(run, compared):
    one, two = run("a"), run("b", dataset="letters")
    code, out, err = compared(one, two)
    assert (code, out) == (2, "")
    assert "shapes" in err and "letters" in err and err.count("\n") == 1
    code, _, err = compared(one / "eval" / "budget-50", "--eval", "budgt-50")
    assert code == 2 and err.count("\n") == 1
    assert_names(err, "budgt-50")
    code, _, err = compared()
    assert code == 2 and "RUN" in err and err.count("\n") == 1
    (one / "config.yaml").write_text("7: [")
    code, _, err = compared(one)
    assert code == 2 and "config.yaml" in err and err.count("\n") == 1
