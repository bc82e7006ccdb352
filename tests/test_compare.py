"""Comparing evaluations on the command line: the files, and errors of the user."""

import csv
import json
import os
import subprocess
import sys
import warnings

import pytest
from helpers import ROOT, assert_names, refusal, run_main
from matplotlib.figure import Figure
from reports import public, rows, seeds, timing, write_run

from early_exit import compare
from early_exit.evaluation import comparison, comparison_plot
from early_exit.evaluation.comparison import Comparison
from early_exit.evaluation.literature import read_points
from early_exit.evaluation.panels import panels_of
from early_exit.evaluation.statics import listed_networks, static_networks
from early_exit.system import files


@pytest.fixture
def made_run(tmp_path):
    """Writes a run of a name; see `reports.write_run`."""
    return lambda name, *arguments, **values: write_run(
        tmp_path / "runs" / name, *arguments, **values
    )


@pytest.fixture
def compared(monkeypatch, capsys):
    """Runs the command line: exit code, output and the one line of an error."""

    def call(*arguments):
        return run_main(compare.main, "early_exit.compare", monkeypatch, capsys, *arguments)

    return call


def test_labels_are_given_in_order(made_run, compared, tmp_path):
    one, two = made_run("a"), made_run("b", settings={"optim": {"epochs": 3}})
    labels = ("network", "other")
    code, out, _ = compared(one, two, "--labels", *labels, "--out", tmp_path / "out", "--no-plots")
    assert code == 0
    assert [line.split(" | ")[0] for line in out.splitlines()[2:4]] == ["| network", "| other"]
    message = refusal(compare.main, [str(one), str(two), "--labels", "one"])
    assert_names(message, "--labels", 1, 2, *(row.label for row in rows(one, two)))


def test_a_label_belongs_to_one_row(made_run, tmp_path):
    runs = [str(made_run(name, evaluation=name)) for name in ("a", "b")]
    message = refusal(compare.main, [*runs, "--labels", "x", " x", "--out", str(tmp_path / "o")])
    assert_names(message, "--labels", "x")


def test_comparisons_of_other_evaluations_stay(made_run):
    """Of the same runs, each time of one evaluation."""
    run = made_run("a", evaluation="cheap")
    made_run("b", evaluation="dear")
    places = {
        compare.default_directory(rows(run / "eval" / "cheap")),
        compare.default_directory(rows(run.parent / "b" / "eval" / "dear")),
    }
    assert len(places) == 2
    assert all(place.name.endswith(("cheap", "dear")) for place in places)


def test_the_figure_shows_the_labels_as_they_are(made_run, tmp_path, monkeypatch):
    one, two = made_run("a"), made_run("b", settings={"optim": {"epochs": 3}})
    labels = [r"_\frac $x$", "$x_"]  # not valid as mathematics in matplotlib
    named = []
    savefig = Figure.savefig

    def read_names(figure, *args, **kwargs):
        named.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", read_names)
    out = tmp_path / "out"
    compare.main([str(one), str(two), "--labels", *labels, "--out", str(out)])
    assert [name.strip() for name in named[:2]] == labels


def test_a_figure_that_cannot_be_drawn_is_left_out(
    made_run, compared, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    out = tmp_path / "out"
    code, shown, _ = compared(made_run("a"), "--out", out)
    assert code == 0 and "figure:" not in shown
    assert {path.name for path in out.iterdir()} == {"table.md", "table.csv", "table.json"}
    assert "![" not in (out / "table.md").read_text("utf-8")


def test_files_of_systems_do_not_count_as_other_files(made_run, compared, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".nfs0001", ".DS_Store", ".~lock.table.csv#", ".out.partial.0123abcd"):
        (out / name).touch()
    assert compared(made_run("a"), "--out", out, "--no-plots")[0] == 0


@pytest.mark.parametrize("name", [".git", ".env", "notes.txt"])
def test_what_a_user_keeps_beside_a_comparison_is_not_replaced(made_run, compared, tmp_path, name):
    out = tmp_path / "out"
    assert compared(made_run("a"), "--out", out, "--no-plots")[0] == 0
    (out / name).write_text("mine")
    code, _, err = compared(tmp_path / "runs" / "a", "--out", out, "--no-plots")
    assert code == 2 and (out / name).read_text() == "mine"
    assert_names(err, out, name, "--out")


def test_the_table_stays_whole_whatever_a_label_has(made_run, compared, tmp_path):
    one, two = made_run("a"), made_run("b", settings={"optim": {"epochs": 3}})
    labels = ("a | b", "two\nlines")
    code, out, _ = compared(one, two, "--labels", *labels, "--out", tmp_path / "out", "--no-plots")
    assert code == 0
    head, _, *rows = out.splitlines()[:4]
    assert rows[0].startswith(r"| a \| b | 1 |") and rows[1].startswith("| two lines | 1 |")
    assert [row.replace(r"\|", "").count("|") for row in rows] == [head.count("|")] * 2
    values = json.loads((tmp_path / "out" / "table.json").read_text())
    assert "a | b" in json.dumps(values)


def test_the_files_have_the_numbers_and_the_figure(made_run, compared, tmp_path):
    others = made_run("b", settings={"optim": {"epochs": 3}})
    code, out, err = compared(*seeds(made_run), others)
    (directory,) = (tmp_path / "runs" / "compare").iterdir()
    assert_names(directory.name.replace("-", " "), 200, 3)
    assert (code, err) == (0, "") and str(directory) in out
    assert sorted(path.name for path in directory.iterdir()) == sorted(compare.FILES)
    assert (directory / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    with (directory / "table.csv").open() as file:
        first, second = csv.DictReader(file)
    assert_names(first["group"], 200)
    assert first["seeds"] == "3"
    assert float(first["chosen_policy_accuracy_percent_mean"]) == pytest.approx(92)
    assert float(first["chosen_policy_accuracy_percent_std"]) == pytest.approx(2)
    assert float(first["macs_millions_mean"]) == pytest.approx(12)
    assert second["macs_percent_of_plain_mean"] == "50.0"
    assert second["macs_percent_of_plain_std"] == ""

    found = json.loads((directory / "table.json").read_text())
    first, second = found["groups"]
    assert first["accuracy"] == pytest.approx({"mean": 0.92, "std": 0.02})
    assert second["accuracy"] == {"mean": 0.9, "std": None}
    assert [one["seed"] for one in first["evaluations"]] == [0, 1, 2]
    assert first["evaluations"][0]["run"] == str(tmp_path / "runs" / "net-0")
    assert first["evaluations"][0]["evaluation"] == "budget-50"
    assert first["exit_accuracy"]["a"]["mean"] == pytest.approx(0.6)
    assert (second["curve"]["accuracy"], second["curve"]["std"]) == ([0.6, 0.95], None)
    assert first["curve"]["std"] == pytest.approx([0.0] * 200)

    page = (directory / "table.md").read_text()
    assert (
        comparison.table(rows(*(tmp_path / "runs" / f"net-{i}" for i in range(3)), others)) in page
    )
    assert "python -m early_exit.compare " in page


def test_an_earlier_comparison_is_replaced_and_nothing_else(made_run, compared, tmp_path):
    directory, out = made_run("a"), tmp_path / "out"
    assert compared(directory, "--out", out)[0] == 0
    assert compared(directory, "--out", out, "--no-plots")[0] == 0
    assert not (out / "curves.png").exists()
    for name in (".DS_Store", "Thumbs.db"):  # of a file browser
        (out / name).touch()
    assert compared(directory, "--out", out, "--no-plots")[0] == 0
    code, _, err = compared(directory, "--out", directory)
    assert code == 2
    assert_names(err, directory, "--out")
    assert (directory / "config.yaml").exists()


def test_a_comparison_that_fails_writes_nothing(made_run, tmp_path, monkeypatch):
    def full(_, target):
        if target.name == "table.json":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "move", full)
    message = refusal(compare.main, [str(made_run("a")), "--out", str(tmp_path / "out")])
    assert "No space left" in message
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_long_name_is_cut(made_run):
    groups = rows(*(made_run(f"r{i}", settings={"optim": {"lr": 0.001 * i}}) for i in range(1, 20)))
    assert len(compare.default_directory(groups).name) <= 80


@pytest.mark.parametrize("number", [1, 8])
def test_the_figure_of_many_groups(made_run, compared, tmp_path, number):
    runs = [made_run(f"r{i}", settings={"optim": {"lr": 0.01 * (i + 1)}}) for i in range(number)]
    assert compared(*runs, "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


@pytest.fixture
def everything(made_run, tmp_path):
    """Two seeds, another run and a plain one in two runtimes, and a file of the literature."""
    common = {
        "static_networks": [public("small", 0.91, 5), public("large", 0.96, 15)],
        "timing": [timing(8, 4.0, 2.0, small=1.0, large=3.0)],
        "curve_seconds": [{"batch_size": 8, "plain": 4.0, "val": [1, 0.2], "test": [1, 0.2]}],
    }
    runs = [
        made_run("a-0", 0, runtime="openvino", **common),
        made_run("a-1", 1, runtime="openvino", accuracy=0.91, **common),
        made_run("b", settings={"optim": {"epochs": 3}}, runtime="onnxruntime", **common),
        made_run("plain", exits=(), share=1.0, accuracy=0.95, evaluation="plain"),
    ]
    text = (ROOT / "benchmarks" / "literature.yaml").read_text("utf-8")
    points = tmp_path / "points.yaml"
    points.write_text(text.replace("dataset: cifar10", "dataset: shapes"))
    return runs, points


@pytest.mark.slow
def test_the_figure_of_everything_is_drawn_without_warnings(everything, tmp_path, caplog):
    runs, points = everything
    groups, path = rows(*runs), tmp_path / "figure.png"
    compared = Comparison(
        groups,
        [*static_networks(groups), *listed_networks(points, "shapes")],
        panels_of(groups),
        read_points(points, "shapes"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison_plot.draw(compared, path)
    assert path.stat().st_size > 30_000 and not caplog.records


def test_static_networks_and_the_literature_are_shown_and_written(everything, compared, tmp_path):
    runs, points = everything
    out = tmp_path / "out"
    code, shown, _ = compared(*runs, "--points", points, "--out", out, "--no-plots")
    page, values = (out / "table.md").read_text(), json.loads((out / "table.json").read_text())
    assert code == 0
    for text in (shown, page):
        assert "arXiv:1703.09844" in text and "its authors" in text
    assert [row["static_network"] for row in values["savings"]["macs"]][-2:] == ["small", "large"]
    assert [len(panel["savings"]) for panel in values["savings"]["seconds"]] == [2, 2]
    assert len(values["literature"]) == 5
    flags = ("--statics", points, "--out", tmp_path / "listed", "--no-plots")
    code, shown, _ = compared(*runs, *flags)
    values = json.loads((tmp_path / "listed" / "table.json").read_text())
    assert code == 0 and "| L2W-DEN |" in shown and not values["literature"]
    assert [row["static_network"] for row in values["savings"]["macs"]][-2:] == ["MSDNet", "RANet"]


def test_a_batch_size_that_was_not_timed_is_an_error(made_run, compared):
    run = made_run("a", timing=[timing(8, 4.0, 2.0), timing(64, 4.0, 2.0)])
    code, _, err = compared(run, "--batch-size", 3)
    assert code == 2 and err.count("\n") == 1
    assert_names(err, "--batch-size", 3, 8, 64)


@pytest.mark.slow
def test_from_another_working_directory(made_run, tmp_path):
    made_run("a"), made_run("b", settings={"optim": {"epochs": 3}})
    done = subprocess.run(
        [sys.executable, "-m", "early_exit.compare", "runs/a", "runs/b", "--no-plots"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_names(done.stdout, 200, 3)  # the epochs
    assert len([*(tmp_path / "runs" / "compare").glob("*200*3*/table.md")]) == 1


def test_the_same_evaluation_twice_is_one_row(made_run, compared, tmp_path):
    directory = made_run("net")
    code, out, _ = compared(
        directory, directory / "eval" / "budget-50", "--out", tmp_path / "out", "--no-plots"
    )
    assert code == 0 and out.count("| net |") == 1


def test_everything_in_a_directory_can_be_compared_again(made_run, compared, tmp_path):
    """As a shell expands runs/*, with what the first comparison wrote."""
    runs = tmp_path / "runs"
    made_run("a"), made_run("b", settings={"optim": {"epochs": 3}})
    compared(runs / "a", "--out", runs / "table", "--no-plots")
    first = compared(*sorted(runs.iterdir()), "--no-plots")
    assert (runs / "compare").is_dir()
    again = compared(*sorted(runs.iterdir()), "--no-plots")
    assert again == first
    assert first[0] == 0 and first[2] == ""


def test_what_is_not_evaluated_is_named_and_the_rest_compared(made_run, compared, tmp_path):
    runs = tmp_path / "runs"
    made_run("a"), made_run("other", evaluation="mine")
    for name in ("empty", "not-evaluated"):
        (runs / name).mkdir()
    (runs / "not-evaluated" / "checkpoint.pt").touch()
    (runs / "notes.txt").write_text("to do")
    (runs / "latest").symlink_to("removed")
    (runs / "torn" / "eval" / "x").mkdir(parents=True)
    (runs / "torn" / "eval" / "x" / "report.json").write_text("{")
    code, out, err = compared(*sorted(runs.iterdir()), "--no-plots", "--eval", "budget-50")
    assert code == 0
    assert len(err.splitlines()) == 6 and "Traceback" not in err
    skipped = ("empty", "latest", "notes.txt", "not-evaluated", "other")
    assert_names(err, *(runs / name for name in skipped))
    assert out.splitlines()[2].startswith("| a |")


def test_an_evaluation_that_cannot_be_read_does_not_hide_the_others(made_run, compared):
    """Whatever their names: it comes first."""
    runs = [made_run("a"), made_run("b", settings={"optim": {"epochs": 3}})]
    torn = runs[0] / "eval" / "a-torn" / "report.json"
    torn.parent.mkdir()
    torn.write_text("{")
    code, out, err = compared(*runs, "--no-plots")
    assert (code, len(err.splitlines()), out.count("| budget 50 % of MACs |")) == (0, 1, 2)
    assert_names(err, torn)


@pytest.mark.parametrize("names", [("none",), ("none", "a"), ("empty",), ("empty", "empty2")])
def test_a_path_that_is_not_there_and_nothing_at_all_are_errors(
    made_run, compared, tmp_path, names
):
    made_run("a")
    for name in ("empty", "empty2"):
        (tmp_path / "runs" / name).mkdir()
    code, out, err = compared(*(tmp_path / "runs" / name for name in names))
    assert (code, out) == (2, "")
    assert err.splitlines()


def test_a_directory_of_runs_and_a_comparison_are_told(made_run, compared, tmp_path):
    compared(made_run("a"), "--no-plots")
    for path, named in (("runs", "runs/*"), ("runs/compare", "comparison")):
        code, _, err = compared(tmp_path / path)
        assert code == 2 and named in err and err.count("\n") == 1


def test_a_place_that_cannot_be_written_names_the_flag(made_run, compared, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    code, _, err = compared(made_run("a"), "--no-plots")
    assert code == 2
    assert_names(err, "--out")


def test_errors_of_the_user_end_in_one_line(made_run, compared):
    one, two = made_run("a"), made_run("b", dataset="letters")
    code, out, err = compared(one, two)
    assert (code, out) == (2, "")
    assert_names(err, "shapes", "letters", one, two)
    assert err.count("\n") == 1
    code, _, err = compared(one / "eval" / "budget-50", "--eval", "budgt-50")
    assert code == 2 and err.count("\n") == 1
    assert_names(err, "budgt-50")
    code, _, err = compared()
    assert code == 2 and "RUN" in err and err.count("\n") == 1
    (one / "config.yaml").write_text("7: [")
    code, _, err = compared(one)
    assert code == 2 and "config.yaml" in err and err.count("\n") == 1


def test_a_plain_network_can_be_compared(made_run, compared, tmp_path):
    plain = made_run("plain", exits=(), share=1.0, evaluation="plain")
    assert compared(plain, made_run("exits"), "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
