"""The table of a comparison and the notes below it."""

import csv
import dataclasses

import pytest
from helpers import assert_names
from reports import rows, seeds, timing

from early_exit.evaluation import comparison


def cells(groups) -> list[list[str]]:
    """The cells of the Markdown table, heads first."""
    lines = comparison.table(groups).splitlines()
    return [line.strip("| ").split(" | ") for line in (lines[0], *lines[2:])]


def test_the_table(made_run):
    heads, row, single = cells(
        rows(
            *seeds(made_run, timing=[timing(8, 3.0, 2.0)]),
            made_run("one", settings={"optim": {"epochs": 3}}),
        )
    )
    assert len(heads) == len(row)
    assert_names(heads[3], "a")
    assert_names(heads[-1], 8)  # the batch size of the speed-up
    assert_names(row[0], 200)
    assert row[1:] == [
        "3",
        "budget 50 % of MACs",
        "60.00 ± 0.00 %",
        "95.00 ± 0.00 %",
        "92.00 ± 2.00 %",
        "60.0 ± 10.0 %",
        "12.00 ± 2.00",
        "1.50 ± 0.00 x",
    ]
    assert_names(single[0], 3)
    assert single[1:] == [
        "1",
        "budget 50 % of MACs",
        "60.00 %",
        "95.00 %",
        "90.00 %",
        "50.0 %",
        "10.00",
        "-",
    ]


def test_accuracies_of_exits_are_shown_if_the_rows_have_as_many(made_run):
    one, other = made_run("a"), made_run("b", names=("early",))
    three = made_run("c", exits=(0.5, 0.6, 0.7))
    heads, row, _ = cells(rows(one, other))
    assert_names(heads[3], 1)
    assert row[3] == "60.00 %"
    assert cells(rows(one, three))[1][3] == "95.00 %"  # the final exit's


def test_a_plain_network_is_a_row_without_a_goal(made_run):
    plain = made_run("plain", exits=(), accuracy=0.93, share=1.0, final=0.93, evaluation="plain")
    heads, row, _ = cells(rows(plain, made_run("exits")))
    assert_names(heads[3], "a")
    assert row == ["plain", "1", "-", "-", "93.00 %", "93.00 %", "100.0 %", "20.00"]


def test_of_cuts_mean_and_deviation_are_shown(made_run):
    cuts = {
        "count": 10,
        "accuracy": {"mean": 0.91, "std": 0.01},
        "macs_share": {"mean": 0.4, "std": 0.02},
        "final_accuracy": {"mean": 0.94, "std": 0.0},
    }
    groups = rows(made_run("net", cuts=cuts))
    row = cells(groups)[1]
    assert_names(row[1], 1, 10)
    assert row[2:] == [
        "budget 50 % of MACs",
        "60.00 %",
        "94.00 ± 0.00 %",
        "91.00 ± 1.00 %",
        "40.0 ± 2.0 %",
        "8.00 ± 0.40",
    ]
    assert any("±" in note and "cut" in note for note in comparison.notes(groups))


def test_seeds_of_cuts_vary_over_seeds(made_run):
    def cuts(accuracy):
        spread = {"mean": accuracy, "std": 0.5}
        return {"count": 3, "accuracy": spread, "macs_share": spread, "final_accuracy": spread}

    groups = rows(made_run("a-0", 0, cuts=cuts(0.90)), made_run("a-1", 1, cuts=cuts(0.92)))
    assert dataclasses.astuple(groups[0].accuracy()) == pytest.approx((0.91, 0.02 / 2**0.5))
    notes = comparison.notes(groups)
    assert any(all(word in note for word in ("±", "seed", "cut")) for note in notes)


def test_the_notes_tell_deviations_and_splits(made_run):
    several = comparison.notes(rows(*seeds(made_run)))
    assert any("±" in note and "seed" in note for note in several)
    assert not any("±" not in note and "seed" in note for note in several)  # as of one seed
    other = made_run("b", val_from="half of test", settings={"optim": {"lr": 0.3}})
    mixed = comparison.notes(rows(made_run("a"), other))
    assert any("±" not in note and "seed" in note for note in mixed)
    (split,) = [note for note in mixed if "half of test" in note]
    assert_names(split, 0.3, "held out from train")
    assert any("optim.lr" in note for note in mixed)


@pytest.mark.parametrize(
    ("runtimes", "heading"),
    [
        (("openvino", "openvino"), "speed-up in openvino (float32), batch 8"),
        (("openvino", "torch"), "speed-up in the row's runtime, batch 8"),
    ],
)
def test_a_speedup_stands_with_its_runtime(made_run, runtimes, heading):
    timed = [timing(8, 3.0, 2.0)]
    groups = rows(
        made_run("a", runtime=runtimes[0], timing=timed),
        made_run("b", runtime=runtimes[1], timing=timed, settings={"optim": {"epochs": 3}}),
    )
    assert cells(groups)[0][-1] == heading
    (note,) = [note for note in comparison.notes(groups) if note.startswith("Speed-ups")]
    assert_names(note, "same runtime", *(f"{name} (float32)" for name in runtimes))
    written = csv.DictReader(comparison.to_csv(groups).splitlines())
    assert [row["runtime"] for row in written] == [*runtimes]


@pytest.mark.parametrize("third", [{"timing": []}, {"device": "another CPU"}])
def test_a_speedup_is_of_all_seeds_on_one_machine_or_of_none(made_run, third):
    timed = {"timing": [timing(8, 3.0, 2.0)]}
    two = [made_run(f"net-{seed}", seed, **timed) for seed in range(2)]
    assert cells(rows(*two))[1][-1] == "1.50 ± 0.00 x"
    three = rows(*two, made_run("net-2", 2, **(timed | third)))
    assert len(three[0].members) == 3
    assert cells(three)[1][-1] == "-" and three[0].speedup(8) is None


@pytest.mark.parametrize("given", ["thresholds_given", "policy_given"])
def test_what_was_given_is_not_said_to_be_chosen_on_val(made_run, given):
    chosen = made_run("a")
    assert any("Policies were chosen on val;" in note for note in comparison.notes(rows(chosen)))
    groups = rows(chosen, made_run("b", settings={"optim": {"epochs": 3}}, **{given: True}))
    (note,) = [note for note in comparison.notes(groups) if "chosen on val" in note]
    assert_names(note, "given", groups[1].label)
    assert groups[0].label not in note
