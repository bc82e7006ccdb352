"""Groups of runs: what belongs to one, and its means and curve."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from helpers import assert_names
from reports import PLAIN_MACS, made_report, rows, seeds

from early_exit.evaluation.groups import names_of, same_networks
from early_exit.evaluation.labels import labelled
from early_exit.evaluation.stored import Value


def test_seeds_of_a_group_are_one_row_with_mean_and_deviation(made_run):
    [row] = rows(*seeds(made_run))
    assert len(row.members) == 3
    assert dataclasses.astuple(row.accuracy()) == pytest.approx((0.92, 0.02))
    assert dataclasses.astuple(row.macs_share()) == pytest.approx((0.6, 0.1))
    assert dataclasses.astuple(row.macs()) == pytest.approx((12e6, 2e6))
    assert dataclasses.astuple(row.final_accuracy()) == pytest.approx((0.95, 0.0))
    assert row.name == "net"


def test_one_seed_has_no_deviation(made_run):
    [row] = rows(made_run("net"))
    assert row.accuracy() == Value(0.9, None)


def test_evaluations_of_a_run_for_other_goals_and_in_other_runtimes_are_one_network(made_run):
    integers = {"runtime": "openvino-int8", "precision": "8-bit integers"}
    runs = [
        made_run("a"),
        moved(made_run("b", goal="max drop 1 points"), "a", "second"),
        moved(made_run("c", runtime="openvino"), "a", "third"),
        moved(made_run("d", **integers), "a", "integers"),
        moved(made_run("e", criterion="entropy"), "a", "entropy"),
        made_run("f", settings={"optim": {"epochs": 3}}),
    ]
    groups = rows(runs[0], runs[-1])
    networks = same_networks(groups)
    assert [len(same) for same in networks] == [3, 1, 1, 1]
    names = names_of(networks)
    assert len(set(names)) == 4
    assert_names(names[1], "entropy")
    assert_names(names[2], "openvino-int8")


def test_one_seed_that_was_timed_and_several_are_named_by_their_seeds(made_run):
    first = made_run("a-0", 0)
    moved(made_run("b", runtime="openvino"), "a-0", "timed")
    other = made_run("c", settings={"optim": {"epochs": 3}})
    networks = same_networks(rows(first, made_run("a-1", 1), made_run("a-2", 2), other))
    names = names_of(networks)
    assert len(set(names)) == 3
    assert {name.partition(", ")[2] for name in names} == {"", "3 seeds", "seed 0"}


def test_labels_do_not_make_two_networks_of_one(made_run):
    run = made_run("a")
    moved(made_run("b", runtime="openvino"), "a", "second")
    groups = rows(run)
    assert len(same_networks(labelled(groups, ["one", "two"]))) == 1


def moved(run, other, name):
    """Moves the evaluation of a run to another run, under another name."""
    (run / "eval" / "budget-50").rename(run.parent / other / "eval" / name)
    return run


def test_settings_that_do_not_affect_the_result_do_not_split_a_group(made_run):
    machine = {"device": "cuda", "threads": 3, "compile": True, "save_every": 5, "print_freq": 7}
    [row] = rows(
        made_run("a", 0, settings={"loss": {"weights": None}, "data": {"root": "/here"}}),
        made_run("b", 1, settings={"loss": {"weights": [1.0, 1.0]}, "run": machine}),
    )
    assert len(row.members) == 2


def test_settings_that_an_older_run_lacks_have_their_defaults(made_run):
    new, old = made_run("a", 0), made_run("b", 1)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["optim"]["ema"], config["run"]["sync_bn"]
    config["model"]["head"] = "conv"
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(rows(new, old)) == 1


def test_loss_weights_have_no_effect_on_a_plain_network(made_run):
    weights = {"loss": {"weights": [0.3, 0.3, 1.0]}}
    (row,) = rows(made_run("plain", settings=weights, exits=()))
    assert row.plain


def test_another_setting_evaluation_goal_or_split_is_another_group(made_run):
    base, other = made_run("a", 0), {"split_seed": 1}
    assert len(rows(base, made_run("b", 1, settings={"optim": {"lr": 0.2}}))) == 2
    assert len(rows(base, made_run("c", 1, evaluation="other"))) == 2
    assert len(rows(base, made_run("d", 1, goal="budget 40 % of MACs"))) == 2
    assert len(rows(base, made_run("e", 1, settings={"data": other}))) == 2
    assert len(rows(base, made_run("f", 1, val_from="half of the official test set"))) == 2
    faster = rows(base, made_run("g", 1, precision="bfloat16"))
    for row, values in zip(faster, ((0, "float32"), (1, "bfloat16")), strict=True):
        assert_names(row.label, *values)


def test_two_runs_of_the_same_seed_are_not_two_seeds(made_run):
    found = rows(made_run("first", 0), made_run("again", 0), made_run("other", 1))
    assert [row.name for row in found[:2]] == ["first", "again"]
    assert_names(found[2].name, 1)


def test_each_shows_seeds_one_by_one(made_run):
    found = rows(*seeds(made_run), each=True)
    assert [row.accuracy().mean for row in found] == [0.90, 0.92, 0.94]
    for seed, row in enumerate(found):
        assert_names(row.name, seed)


def test_reports_without_their_runs_are_rows_of_their_own(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(made_report()))
    assert [row.name for row in rows(tmp_path / "a", tmp_path / "b")] == ["a", "b"]


def test_curves_are_interpolated_linearly_at_common_macs(made_run):
    [row] = rows(
        made_run("a-0", 0, curve=[(1.0, 0.9), (0.2, 0.5)]),
        made_run("a-1", 1, curve=[(1.0, 0.8), (0.4, 0.6)]),
    )
    macs, mean, std = row.curve()
    assert (macs[0], macs[-1]) == (0.4 * PLAIN_MACS, PLAIN_MACS)
    # at 0.4: 0.6 and 0.6; halfway, at 0.7: 0.75 and 0.7; at 1: 0.9 and 0.8
    assert np.interp(0.7 * PLAIN_MACS, macs, mean) == pytest.approx(0.725)
    assert (mean[0], mean[-1]) == pytest.approx((0.6, 0.85))
    assert (std[0], std[-1]) == pytest.approx((0.0, 0.1 / 2**0.5), abs=1e-12)


def test_curves_that_share_no_macs_have_no_mean(made_run):
    [row] = rows(made_run("a-0", 0, curve=[(0.3, 0.5)]), made_run("a-1", 1, curve=[(0.4, 0.5)]))
    assert [len(part) for part in row.curve()] == [0, 0, 0]


def test_runtimes_are_groups_of_their_own(made_run):
    found = rows(*(made_run(f"net-{n}", n, runtime=r) for n, r in enumerate(("torch", "openvino"))))
    assert [[member.runtime for member in row.members] for row in found] == [
        ["torch"],
        ["openvino"],
    ]


def test_a_report_without_a_runtime_is_of_torch(made_run):
    old = made_run("a", 0)
    path = old / "eval" / "budget-50" / "report.json"
    report = json.loads(path.read_text())
    del report["environment"]["runtime"]
    path.write_text(json.dumps(report))
    [row] = rows(old, made_run("b", 1))
    assert [member.runtime for member in row.members] == ["torch", "torch"]
