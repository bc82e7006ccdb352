"""The panels of seconds of a comparison: their unit, and what must not be mixed."""

import pytest
from helpers import assert_names
from reports import PLAIN_MACS, public, rows, timing

from early_exit.evaluation.panels import panels_of
from early_exit.evaluation.statics import static_networks

NETWORKS = [public("small", 0.9, 5), public("large", 0.92, 15)]


def run(made_run, name, sizes=(8,), **values):
    """A run that was timed, with an architecture of its own."""
    values = {"runtime": "openvino", "settings": {"model": {"arch": name}}, **values}
    timed = [timing(size, 4.0 * size, 2.0 * size, small=size, large=3.0 * size) for size in sizes]
    return made_run(name, timing=timed, **values)


def test_one_report_is_in_milliseconds(made_run):
    (panel,) = panels_of(rows(run(made_run, "a", static_networks=NETWORKS)))
    assert (panel.reference, panel.caution) == (None, "")
    assert panel.measured(panel.groups[0]).mean == 2000


def test_the_unit_is_the_most_expensive_network_that_all_timed(made_run):
    groups = rows(
        run(made_run, "a", static_networks=NETWORKS), run(made_run, "b", static_networks=NETWORKS)
    )
    (panel,) = panels_of(groups)
    assert (panel.reference, panel.caution) == (("large", 15_000_000), "")
    assert panel.measured(groups[0]).mean == pytest.approx(100 * 2 / 3)
    small, _ = static_networks(groups)
    assert panel.static(small) == pytest.approx(100 / 3)


def test_a_plain_network_of_the_same_architecture_is_a_unit(made_run):
    same = {"settings": {"model": {"arch": "net"}}}
    groups = rows(
        run(made_run, "a", exits=(), share=1.0, evaluation="plain", **same),
        run(made_run, "b", **same),
    )
    (panel,) = panels_of(groups)
    assert panel.reference == ("net", PLAIN_MACS)
    assert [panel.measured(group).mean for group in groups] == [100, 50]


def test_without_a_common_network_the_processes_are_told(made_run):
    groups = rows(run(made_run, "a"), run(made_run, "b"))
    (panel,) = panels_of(groups)
    assert panel.reference is None
    assert_names(panel.caution, 2, "processes")


@pytest.mark.parametrize("changed", [{"device": "B"}, {"versions": {"torch": "2"}}])
def test_other_machines_and_versions_are_told(made_run, changed):
    common = {"static_networks": NETWORKS, "versions": {"torch": "1", "git": "a"}}
    groups = rows(run(made_run, "a", **common), run(made_run, "b", **{**common, **changed}))
    (panel,) = panels_of(groups)
    assert panel.reference is not None
    assert_names(panel.caution, 2, "machines")
    same = rows(run(made_run, "c", **common), run(made_run, "d", **common))
    assert panels_of(same)[0].caution == ""


def test_the_batch_size_is_the_smallest_that_all_have(made_run):
    groups = rows(
        run(made_run, "a", (1, 64, 256)), run(made_run, "b", (64, 256)), made_run("untimed")
    )
    (panel,) = panels_of(groups)
    assert (panel.batch_size, len(panel.groups)) == (64, 2)
    (panel,) = panels_of(groups, 1)
    assert (panel.batch_size, panel.groups) == (1, (groups[0],))
    assert [group.first.run.name for group in panel.left_out] == ["b"]
    assert panels_of(groups, 3) == []


def test_each_runtime_is_a_panel(made_run):
    groups = rows(run(made_run, "a"), run(made_run, "b", runtime="onnxruntime"))
    assert [panel.runtime for panel in panels_of(groups)] == ["openvino", "onnxruntime"]


def test_accuracy_of_a_public_network_in_integers_is_not_known(made_run):
    groups = rows(
        run(
            made_run,
            "a",
            runtime="openvino-int8",
            precision="8-bit integers",
            static_networks=NETWORKS,
        )
    )
    (panel,) = panels_of(groups)
    assert [panel.static(static) for static in static_networks(groups)] == [None, None]


def test_the_curve_of_seconds_is_in_the_panels_unit(made_run):
    shares = [{"batch_size": 8, "plain": 4.0, "val": [1, 0.5], "test": [1.0, 0.25]}]
    (panel,) = panels_of(rows(run(made_run, "a", curve_seconds=shares)))
    curve = panel.curve(panel.groups[0])
    assert curve.costs.tolist() == [1000, 4000]
    assert curve.accuracy.tolist() == [0.6, 0.95]
