"""The report in words: report.md and the text on the screen."""

import dataclasses
import html
import re
import shutil

import pytest
from by_hand import TASK
from helpers import CPU, assert_names

from early_exit.choosing.goals import MaxDrop
from early_exit.evaluation import page
from early_exit.evaluation.charts import charts
from early_exit.evaluation.evaluate import evaluate
from early_exit.evaluation.markdown import (
    headline,
    provenance,
    sections,
    summary,
    title,
    to_markdown,
)
from early_exit.evaluation.report import Choice, ClassRow, Report
from early_exit.evaluation.report_seconds import RuntimeRow
from early_exit.evaluation.seconds import network_table, segment_table, timing_table
from early_exit.evaluation.tables import (
    MAX_CLASSES,
    class_table,
    escaped,
    exit_table,
    shown_classes,
)
from early_exit.evaluation.verdict import verdicts
from early_exit.inference.latency import BatchSeconds, Timing


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory) -> Report:
    """An evaluation without timing. Not to be changed."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("markdown") / "run")
    return evaluate(run, TASK, MaxDrop(0.02), overrides=CPU, live=False, draw=False)[0]


def class_rows(count: int) -> tuple[ClassRow, ...]:
    """Classes, the most expensive first."""
    return tuple(
        ClassRow(f"class {index}", 1, 0.5, (count - index) / count, (0.5, 0.5))
        for index in range(count)
    )


def test_sections_have_ids_of_their_own(report):
    ids = [section.id for section in sections(report)]
    assert len(set(ids)) == len(ids)
    assert (ids[0], ids[-1]) == ("summary", "provenance")


def test_report_md_has_the_title_the_sections_and_the_plots_before_the_last_one(report):
    text = to_markdown(report, {"a.png": "caption of a", "b.png": "caption of b"})
    headings = [section.heading for section in sections(report)[1:]]
    expected = [*headings[:-1], "caption of a", "caption of b", headings[-1]]
    found = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    assert found == [title(report), *expected]
    assert "![caption of a](a.png)" in text


def test_the_title_names_network_data_regime_and_goal(report):
    assert_names(title(report), "resnet20", "digits", "joint", report.choice.goal)
    assert title(report).endswith(report.choice.goal)
    environment = dataclasses.replace(report.environment, runtime="openvino-bf16")
    assert "in openvino-bf16" in title(dataclasses.replace(report, environment=environment))


def test_the_headline_names_accuracies_and_macs(report):
    values = (report.test.accuracy, report.final_accuracy, report.random_accuracy)
    assert_names(headline(report), *(f"{100 * value:.2f} %" for value in values))
    assert_names(headline(report), f"{100 * report.test.macs_share:.1f} %")


def test_the_screen_shows_the_exits_and_the_files_that_are_there(report, tmp_path):
    (tmp_path / "report.md").touch()
    shown = summary(report, tmp_path)
    assert exit_table(report) in shown and headline(report) in shown
    assert str(tmp_path / "report.md") in shown
    assert "report.html" not in shown


def test_a_disabled_exit_has_no_macs_and_is_called_so(report):
    row = dataclasses.replace(report.exits[0], enabled=False)
    changed = dataclasses.replace(report, exits=(row, *report.exits[1:]))
    line = exit_table(changed).splitlines()[2]
    assert_names(line, "layer1", "disabled")
    assert line.split(" | ")[1] == "-"


def timing_of(**changes) -> Timing:
    """Two segments of 1 and 3 ms, the second exit disabled, in a runtime that is not torch."""
    second = BatchSeconds(1.0, 1.0, 1.0)
    values = dict.fromkeys(("plain", "live", "ideal", "no_exit_taken"), second)
    return Timing(
        batch_size=8,
        images=8,
        repeats=1,
        **values,
        without_heads=None,
        segment_seconds=(1e-3, 0.0, 3e-3),
        speedup_range=(1.0, 1.0),
        **changes,
    )


def test_the_plain_network_has_the_final_exits_own_accuracy(report):
    """Whatever the criterion answers there, which may be made of several exits."""
    live, final = BatchSeconds(0.5, 0.5, 0.5), report.exits[-1]
    changed = dataclasses.replace(
        report,
        exits=(*report.exits[:-1], dataclasses.replace(final, accuracy=0.75)),
        test=dataclasses.replace(report.test, accuracy=0.5),
        final_accuracy=0.625,
        timing=(dataclasses.replace(timing_of(), live=live, speedup_range=(2.0, 2.0)),),
    )
    assert_names(network_table(changed).splitlines()[2], "plain network", "75.00 %")
    (verdict,) = verdicts(changed)
    assert_names(verdict.words, "25.00 points lost")
    assert_names(headline(changed), "62.50 %", "12.50 points lost")
    traces = charts(changed)[0].figure["data"]
    (mark,) = [trace for trace in traces if trace["name"] == "no exit is taken"]
    assert mark["y"] == [62.5]


def test_a_disabled_exit_ends_no_segment(report):
    """MACs and seconds are of the same segments."""
    exits = tuple(
        dataclasses.replace(row, enabled=enabled, macs=macs)
        for row, enabled, macs in zip(report.exits, (True, False, True), (20, 50, 80), strict=True)
    )
    changed = dataclasses.replace(report, exits=exits, timing=(timing_of(),))
    heading, _, macs, seconds = segment_table(changed).splitlines()
    assert_names(heading, "layer1", "final")
    assert "layer2" not in heading
    assert_names(macs, "25.0 %", "75.0 %")
    assert_names(seconds, 8, "25.0 %", "75.0 %")


def test_without_heads_nothing_is_measured_but_in_torch(report):
    changed = dataclasses.replace(report, timing=(timing_of(),))
    assert "without heads" not in timing_table(changed)


def test_top5_has_a_column_if_there_are_many_classes(report):
    rows = tuple(dataclasses.replace(row, top5=0.987) for row in report.exits)
    changed = dataclasses.replace(report, top5=0.991, exits=rows)
    tables = [exit_table(one).splitlines() for one in (report, changed)]
    columns = [{line.count("|") for line in table} for table in tables]
    assert columns[1] == {count + 1 for count in columns[0]}
    assert_names(headline(changed), "99.10 %")
    assert_names(tables[1][2], "98.70 %")


@pytest.mark.parametrize("count", [MAX_CLASSES, MAX_CLASSES + 1, 100])
def test_of_many_classes_the_cheapest_and_the_most_expensive_are_shown(report, count):
    changed = dataclasses.replace(report, classes=class_rows(count))
    shown = shown_classes(changed)
    names = [row.name for row in shown if row]
    assert len(names) == MAX_CLASSES
    assert (names[0], names[-1]) == (f"class {count - 1}", "class 0")
    assert (None in shown) == (count > MAX_CLASSES)
    assert len(class_table(changed).splitlines()) == 2 + len(shown)


@pytest.mark.parametrize(
    "name", ["a | b", "*a*", "`a`", "_a_", "[a](b)", "<b>a</b>", r"a\b", "a & b", "&lt;"]
)
def test_names_are_shown_as_they_are(report, name):
    rows = (dataclasses.replace(class_rows(1)[0], name=name),)
    table = class_table(dataclasses.replace(report, classes=rows))
    cell = escaped(name)
    assert f"| {cell} | 1 |" in table
    (shown,) = re.findall("<td>(.*)</td>", page._converter()(f"| class |\n| --- |\n| {cell} |"))
    assert html.unescape(shown) == name


@pytest.mark.parametrize(
    ("changes", "plain", "cdl", "fitted"),
    [
        ({}, False, False, {"thresholds", "temperatures"}),
        ({"calibrated": False}, False, False, {"thresholds"}),
        ({"thresholds_given": True}, False, False, {"temperatures"}),
        ({}, True, False, {"temperatures"}),
        ({"thresholds_given": True, "calibrated": False}, False, True, {"stages"}),
        ({"thresholds_given": True, "calibrated": False}, False, False, set()),
        ({"thresholds_given": True, "policy_given": True}, False, False, set()),
    ],
)
def test_what_was_fitted_on_val(changes, plain, cdl, fitted):
    values = {
        "goal": "max drop 2 points",
        "criterion": "max_prob",
        "calibrated": True,
        "thresholds_given": False,
        "policy_given": False,
        "val_from": "held out from train",
        "val_images": 5000,
        "test_images": 10000,
    }
    sentence = provenance(Choice(**values | changes), plain=plain, cdl=cdl)
    words = {word for word in ("thresholds", "temperatures", "stages") if word in sentence.lower()}
    assert words == fitted
    assert_names(sentence, "10,000")
    if not changes.get("policy_given"):
        assert_names(sentence, "5,000", "held out from train")


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("given", ["thresholds_given", "policy_given", None])
def test_the_runtimes_of_a_given_policy_are_not_said_to_have_chosen_it(report, given, timed):
    choice = dataclasses.replace(report.choice, **({given: True} if given else {}))
    row = RuntimeRow("torch", "float32", "mine", 0.9, 0.5, (), ())
    timings = (timing_of(),) if timed else ()
    made = dataclasses.replace(report, choice=choice, runtimes=(row,), timing=timings)
    (found,) = [part for part in sections(made) if part.id == "runtimes"]
    words = " ".join(found.body.split())
    assert ("chosen on val" in words) == (given is None)
    assert ("timed in turns" in words) == timed and ("Nothing was timed" in words) != timed
