"""What exits save over static networks, computed by hand; a plain network has 20 million MACs."""

import json
import re

import pytest
import yaml
from helpers import ROOT, assert_names, refusal
from reports import point, public, rows, timing

from cifar10.networks import build_network
from early_exit.evaluation.panels import panels_of
from early_exit.evaluation.savings import (
    budgets,
    macs_savings,
    policies,
    seconds_savings,
    unbeaten,
)
from early_exit.evaluation.savings_text import MACS, sections, statement
from early_exit.evaluation.statics import LISTED, PUBLIC, RUN, listed_networks, static_networks
from early_exit.model.cost import network_cost
from early_exit.trained import HELD_OUT

CURVE = [(1.0, 0.95), (0.5, 0.92), (0.3, 0.90), (0.2, 0.60)]
NETWORKS = [public("low", 0.90, 5), public("middle", 0.91, 15), public("high", 0.96, 30)]


def found(groups) -> dict[str, tuple]:
    """By static network: accuracy and millions of MACs of the policy, and what it saves."""
    return {
        row.static.name: row.exits
        and (row.exits.accuracy, 1e-6 * row.exits.cost, pytest.approx(row.saving))
        for row in macs_savings(groups, static_networks(groups))
    }


def test_the_cheapest_policy_of_no_lower_accuracy_and_what_it_saves(made_run):
    groups = rows(made_run("exits", curve=CURVE, static_networks=NETWORKS))
    assert found(groups) == {
        "low": (0.90, 6.0, 1 - 6 / 5),  # equally accurate, and more expensive
        "middle": (0.92, 10.0, 1 - 10 / 15),  # not interpolated between 0.90 and 0.92
        "high": None,
    }


def test_the_best_of_several_runs_counts(made_run):
    cheaper = made_run("b", curve=[(0.4, 0.93)], share=0.9)
    groups = rows(made_run("a", curve=CURVE, static_networks=NETWORKS), cheaper)
    assert found(groups)["middle"][:2] == (0.93, 8.0)


@pytest.mark.parametrize("on_val", [0.91, 0.93])
def test_which_run_is_best_is_decided_on_val(made_run, on_val):
    """The second is more accurate on test at the same cost."""
    first = made_run("a", curve=[(0.5, 0.92)], static_networks=NETWORKS)
    second = made_run("b", curve=[(0.5, 0.95)], val_curve=[(0.5, on_val)], accuracy=0.5)
    groups = rows(first, second)
    row = {row.static.name: row for row in macs_savings(groups, static_networks(groups))}["middle"]
    assert row.exits.accuracy == (0.92 if on_val < 0.92 else 0.95)


@pytest.mark.parametrize(
    "other",
    [
        {"settings": {"data": {"split_seed": 1}}},
        {"settings": {"data": {"val_size": 0.1}}},
        {"val_from": "half of test"},
    ],
)
def test_val_decides_only_between_runs_that_have_the_same(made_run, other):
    first = made_run("a", curve=[(0.5, 0.92)], static_networks=NETWORKS)
    second = made_run("b", curve=[(0.4, 0.95)], val_curve=[(0.5, 0.1)], accuracy=0.5, **other)
    assert found(rows(first, second))["middle"][:2] == (0.95, 8.0)


HALF = "half of the official test set, cut by seed 0"


@pytest.mark.parametrize(
    ("val_from", "cuts", "same"),
    [
        (HELD_OUT, ({"split_seed": 1}, {"split_seed": 1}), True),
        (HELD_OUT, ({"split_seed": 0}, {"split_seed": 1}), False),
        (HELD_OUT, ({"val_size": 0.1}, {"val_size": 0.2}), False),
        (HALF, ({"split_seed": 0}, {"split_seed": 1}), True),
    ],
)
def test_an_export_says_in_its_report_which_val_it_has(made_run, val_from, cuts, same):
    """It has no config.yaml."""
    runs = []
    points = ((0.5, 0.92), 0.92), ((0.4, 0.95), 0.1)  # the second is cheaper, but not on val
    for (outcome, on_val), data in zip(points, cuts, strict=True):
        run = made_run(
            f"export{len(runs)}",
            curve=[outcome],
            val_curve=[(0.5, on_val)],
            accuracy=0.5,
            val_from=val_from,
            settings={"data": data},
            static_networks=NETWORKS,
        )
        (path,) = run.glob("eval/*/report.json")
        report = json.loads(path.read_text())
        report["run"]["settings"] = {"data": data}
        path.write_text(json.dumps(report))
        (run / "config.yaml").unlink()
        runs.append(run)
    assert found(rows(*runs))["middle"][0] == (0.92 if same else 0.95)


def test_an_evaluated_policy_that_is_worse_on_val_does_not_count(made_run):
    """It costs as much on val as one that is better there, and is better on test."""
    runs = [
        made_run(name, accuracy=accuracy, share=0.5, val=point(on_val, 0.5), settings=settings)
        for name, accuracy, on_val, settings in (
            ("a", 0.91, 0.90, {}),
            ("b", 0.95, 0.89, {"optim": {"epochs": 3}}),
        )
    ]
    groups = rows(*runs)
    kept = unbeaten([each for group in groups for each in policies(group)])
    evaluated = [each for each in kept if each.budget is None]
    assert [(each.group, each.accuracy) for each in evaluated] == [(groups[0], 0.91)]
    assert evaluated[0].val == (pytest.approx(10e6), 0.90)


def test_thresholds_are_chosen_on_val(made_run):
    """The second is cheaper and more accurate on test, but no budget on val chooses it."""
    on_val = [(1.0, 0.95), (0.5, 0.80), (0.4, 0.85), (0.2, 0.6)]
    curve = [(1.0, 0.95), (0.3, 0.94), (0.45, 0.92), (0.2, 0.6)]
    groups = rows(made_run("exits", curve=curve, val_curve=on_val, static_networks=NETWORKS))
    assert found(groups)["middle"][:2] == (0.92, 9.0)


def test_budgets_of_several_seeds_are_means_of_what_each_chooses(made_run):
    groups = rows(
        made_run("a-0", 0, curve=[(0.2, 0.6), (0.6, 0.9)]),
        made_run("a-1", 1, curve=[(0.3, 0.7), (0.5, 0.8)]),
    )
    points = [(1e-6 * one.budget, 1e-6 * one.cost, one.accuracy) for one in budgets(groups[0])]
    assert points == [
        pytest.approx((6, (4 + 6) / 2, (0.6 + 0.7) / 2)),
        pytest.approx((10, (4 + 10) / 2, (0.6 + 0.8) / 2)),
        pytest.approx((12, (12 + 10) / 2, (0.9 + 0.8) / 2)),
    ]


def test_of_several_cuts_only_the_evaluated_policy_counts(made_run):
    cuts = {
        "count": 10,
        "accuracy": {"mean": 0.915, "std": 0.01},
        "macs_share": {"mean": 0.7, "std": 0.02},
        "final_accuracy": {"mean": 0.94, "std": 0.0},
    }
    groups = rows(made_run("exits", curve=CURVE, static_networks=NETWORKS, cuts=cuts))
    assert found(groups)["middle"][:2] == (0.915, 14.0)


@pytest.mark.parametrize("given", ["thresholds_given", "policy_given"])
def test_what_was_not_chosen_on_val_does_not_count_and_is_named(made_run, given):
    groups = rows(made_run("mine", curve=CURVE, static_networks=NETWORKS, **{given: True}))
    assert set(found(groups).values()) == {None}
    (note,) = [part for part in sections(groups, static_networks(groups), ()) if "given" in part]
    assert_names(note, "mine")


def test_a_plain_run_is_a_static_network_once_for_all_its_runtimes(made_run):
    plain = {"exits": (), "accuracy": 0.91, "share": 1.0, "final": 0.91}
    run = made_run("plain", evaluation="eval", **plain)
    other = made_run("other", evaluation="eval-openvino", runtime="openvino", **plain)
    (other / "eval" / "eval-openvino").rename(run / "eval" / "eval-openvino")
    groups = rows(run, made_run("exits", curve=CURVE))
    (static,) = static_networks(groups)
    assert (static.kind, static.accuracy, static.macs) == (RUN, 0.91, 20_000_000)
    assert len(static.groups) == 2 and "openvino" not in static.name
    assert found(groups) == {static.name: (0.92, 10.0, 0.5)}


def test_in_seconds_a_plain_run_has_the_accuracy_of_the_runtime(made_run):
    """And in multiply-adds that of its first evaluation, whatever that is."""
    common = {"evaluation": "eval", "runtime": "torch"}
    plain = {"exits": (), "share": 1.0, "settings": {"model": {"arch": "resnet20"}}}
    run = made_run("plain", accuracy=0.93, timing=[timing(8, 5.0, 5.0)], **common, **plain)
    coarse = {"evaluation": "coarse", "runtime": "openvino-bf16", "precision": "bfloat16"}
    other = made_run("other", accuracy=0.91, timing=[timing(8, 5.0, 5.0)], **coarse, **plain)
    (other / "eval" / "coarse").rename(run / "eval" / "coarse")
    exits = {"accuracy": 0.92, "timing": [timing(8, 9.0, 3.0)]}
    groups = rows(run, made_run("exact", **common, **exits), made_run("less", **coarse, **exits))
    statics, found = static_networks(groups), {}
    for panel in panels_of(groups):
        (row,) = seconds_savings(panel, statics)
        found[panel.precision] = (row.static.accuracy, row.exits is not None)
    assert found == {"float32": (0.93, False), "bfloat16": (0.91, True)}
    (static,) = statics
    assert static.accuracy == 0.91  # of the first by name


def listed(path, *networks):
    """A file of networks: label, accuracy in percent, and the rest of each point."""
    points = [
        {"label": label, "dataset": "shapes", "accuracy_percent": accuracy, "source": "us", **rest}
        for label, accuracy, rest in networks
    ]
    path.write_text(yaml.safe_dump({"points": points}))
    return path


def test_networks_of_a_file_are_static_networks_of_their_own_kind(made_run, tmp_path):
    path = listed(
        tmp_path / "statics.yaml",
        ("dear", 92.0, {"macs_millions": 12.5}),
        ("cheap", 91.0, {"macs_millions": 11.0}),
    )
    networks = listed_networks(path, "shapes")
    assert [(one.kind, one.name, one.accuracy, one.macs) for one in networks] == [
        (LISTED, "cheap", 0.91, 11_000_000),
        (LISTED, "dear", 0.92, 12_500_000),
    ]
    # a better one of another kind does not make them no rivals
    groups = rows(made_run("exits", curve=CURVE, static_networks=[public("p", 0.99, 1)]))
    statics = [*static_networks(groups), *networks]
    assert {row.static.name: row.saving for row in macs_savings(groups, statics)} == {
        "p": None,
        "cheap": pytest.approx(1 - 10 / 11),
        "dear": pytest.approx(1 - 10 / 12.5),
    }
    text = "\n".join(sections(groups, statics, ()))
    assert_names(text, f"than the best of the {LISTED}", f"The accuracy of {LISTED}", "us")


def test_a_listed_network_needs_multiply_adds(tmp_path):
    path = listed(tmp_path / "statics.yaml", ("net", 91.0, {"milliseconds": 3}))
    assert_names(refusal(listed_networks, path, "shapes"), path, "net", "macs_millions")


def test_our_own_list_is_read():
    networks = listed_networks(ROOT / "benchmarks" / "statics.yaml", "cifar10")
    page = (ROOT / "docs-src" / "docs" / "results.md").read_text()
    table = re.findall(r"^\| .* \| ([\d.]+) % \| ([\d.]+) \| `", page, re.MULTILINE)
    stated = {(float(accuracy), float(macs)) for accuracy, macs in table}
    for network in networks:
        backbone = build_network(network.name.partition(",")[0], ())
        macs = network_cost(backbone).plain_macs
        assert network.macs == pytest.approx(macs, abs=0.01e6), network.name
        row = (round(100 * network.accuracy, 2), round(1e-6 * network.macs, 2))
        assert row in stated, network.name
    assert len(networks) == 9


def test_a_network_than_which_another_is_better_is_named(made_run):
    networks = [public("good", 0.92, 10), public("bad", 0.91, 15), public("twin", 0.92, 10)]
    groups = rows(made_run("exits", curve=CURVE, static_networks=networks))
    better = {row.static.name: row.better for row in macs_savings(groups, static_networks(groups))}
    assert better == {"good": "", "bad": "good", "twin": ""}


@pytest.mark.parametrize(
    ("networks", "named"),
    [
        ((NETWORKS[1],), ("91.00", "33.3", "fewer", PUBLIC)),
        ((NETWORKS[0], NETWORKS[1]), ("90.00", "91.00", "20.0", "more", "low")),
        ((NETWORKS[2],), ("high",)),
        # two of one name
        ((public("a", 0.90, 5), public("a", 0.92, 20)), ("90.00", "92.00", "20.0", "more", "a")),
        # the second is no rival, although exits save most beside it
        ((public("a", 0.92, 12), public("b", 0.90, 20)), ("92.00", "16.7", "fewer")),
    ],
)
def test_the_statement_is_about_the_worst_accuracy(made_run, networks, named):
    groups = rows(made_run("exits", curve=CURVE, static_networks=list(networks)))
    words = statement(macs_savings(groups, static_networks(groups)), PUBLIC, MACS)
    assert_names(words, *named)


def test_seconds_are_compared_within_a_process(made_run):
    """The second run was measured on a machine that is three times as slow."""
    networks = [public("net", 0.90, 15), public("unit", 0.99, 20)]
    common = {"runtime": "onnxruntime", "static_networks": networks, "accuracy": 0.91}
    fast = made_run("a", timing=[timing(8, 5.0, 3.0, net=4.0, unit=5.0)], **common)
    slow = made_run(
        "b",
        timing=[timing(8, 15.0, 6.0, net=12.0, unit=15.0)],
        settings={"optim": {"epochs": 3}},
        **common,
    )
    groups = rows(fast, slow)
    (panel,) = panels_of(groups)
    row, missed = seconds_savings(panel, static_networks(groups))
    assert (row.static.name, row.saving) == ("net", pytest.approx(1 - 6 / 12))
    assert row.exits.group is groups[1]
    assert (row.cost, row.exits.cost) == (pytest.approx(80), pytest.approx(40))  # % of "unit"
    assert (missed.static.name, missed.exits) == ("unit", None)


def test_seconds_of_two_machines_save_nothing_if_no_network_relates_them(made_run):
    plain = {"exits": (), "share": 1.0, "accuracy": 0.9, "evaluation": "plain"}
    plain["settings"] = {"model": {"arch": "resnet20"}}
    runs = {
        device: rows(
            made_run(f"plain-{device}", timing=[timing(8, 5.0, 5.0)], device="A", **plain),
            made_run(f"exits-{device}", timing=[timing(8, 9.0, 3.0)], device=device),
        )
        for device in ("A", "B")
    }
    found = {}
    for device, groups in runs.items():
        (panel,) = panels_of(groups)
        assert panel.reference is None
        found[device] = len(seconds_savings(panel, static_networks(groups)))
    assert found == {"A": 1, "B": 0}


def test_where_no_network_with_exits_was_timed_nothing_is_said_not_to_be_reached(made_run):
    plain = {"exits": (), "share": 1.0, "accuracy": 0.9, "evaluation": "plain"}
    plain["settings"] = {"model": {"arch": "resnet20"}}
    groups = rows(
        made_run("exits"), made_run("plain", timing=[timing(8, 5.0, 5.0)], device="A", **plain)
    )
    (panel,) = panels_of(groups)
    assert seconds_savings(panel, static_networks(groups)) == []


def test_without_exits_or_static_networks_there_is_no_section(made_run):
    assert not sections(rows(made_run("exits")), [], [])
    plain = rows(made_run("plain", exits=(), static_networks=NETWORKS))
    assert not sections(plain, static_networks(plain), [])
