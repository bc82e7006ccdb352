"""What is chosen on val for each goal, and how it is reported."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from by_hand import (
    NAMES,
    PLAIN,
    TASK,
    macs_with,
    probabilities,
    quickly,
    slow_exit,
    slow_outcome,
    slow_scores,
    stored,
)
from helpers import CPU, assert_names

from early_exit.choosing import guarantees
from early_exit.choosing.choice import choose
from early_exit.choosing.goals import (
    Budget,
    ConditionalDeepLearning,
    FixedThresholds,
    LatencyBudget,
    MaxDrop,
    Risk,
)
from early_exit.choosing.record import ExitRecord, score_record
from early_exit.choosing.search import NOISE
from early_exit.errors import UserError
from early_exit.evaluation import live
from early_exit.evaluation.evaluate import evaluate
from early_exit.evaluation.markdown import summary
from early_exit.inference.policy import Policy
from early_exit.inference.segment_times import SegmentTimes
from early_exit.model.cost import Cost


class TestChoice:
    def outcomes(self, directory: Path, policy: dict) -> list[tuple[float, float, float]]:
        """Threshold, accuracy and mean MACs on val of every shared threshold, with every subset of
        the exits enabled."""
        logits, targets = stored(directory, "val")
        scores = [slow_scores(e, policy["criterion"], policy["temperatures"]) for e in logits]
        found = []
        # between two neighbouring scores every threshold does the same
        early = sorted({score for row in scores for score in row[:-1]})
        gaps = [(a + b) / 2 for a, b in itertools.pairwise(early) if b - a > 1e-6]
        for threshold, *enabled in itertools.product(
            [early[0] - 1, *gaps, early[-1] + 1], (True, False), (True, False)
        ):
            exit_index = [slow_exit(row, [threshold] * 2, enabled) for row in scores]
            correct = sum(
                exits[index].index(max(exits[index])) == target
                for exits, index, target in zip(logits, exit_index, targets, strict=True)
            )
            macs = sum(macs_with(enabled)[index] for index in exit_index) / 100
            found.append((threshold, correct / 100, macs))
        return found

    @pytest.mark.parametrize("criterion", ["max_prob", "entropy", "margin"])
    @pytest.mark.parametrize("drop", [0.0, 0.03])
    def test_max_drop_is_the_cheapest_within_the_drop_on_val(self, copy, drop, criterion):
        report, policy = quickly(copy, MaxDrop(drop, criterion=criterion))
        outcomes = self.outcomes(copy, policy)
        least = report["exits"][-1]["accuracy_val"] - drop - 1e-9
        cheapest = min(macs for _, accuracy, macs in outcomes if accuracy >= least)
        assert report["val"]["accuracy"] >= least
        assert report["val"]["macs_share"] == pytest.approx(cheapest / PLAIN)

    @pytest.mark.parametrize("share", [0.75, 0.9])
    def test_budget_is_the_most_accurate_within_it_on_val(self, copy, share):
        report, policy = quickly(copy, Budget(share))
        outcomes = self.outcomes(copy, policy)
        best = max(accuracy for _, accuracy, macs in outcomes if macs <= share * PLAIN)
        assert report["val"]["macs_share"] <= share
        assert report["val"]["accuracy"] == pytest.approx(best)

    def test_one_threshold_is_for_all_early_exits(self, copy):
        assert quickly(copy, FixedThresholds((0.7,)))[1]["thresholds"] == [0.7, 0.7]

    def test_one_threshold_each(self, copy):
        assert quickly(copy, FixedThresholds((0.7, 0.2)))[1]["thresholds"] == [0.7, 0.2]

    def test_temperatures_are_the_best_on_val(self, copy):
        _, policy = quickly(copy, MaxDrop(0.0))
        logits, targets = stored(copy, "val")

        def loss(index: int, temperature: float) -> float:
            return -sum(
                math.log(probabilities(image[index], temperature)[target])
                for image, target in zip(logits, targets, strict=True)
            )

        for index, temperature in enumerate(policy["temperatures"]):
            assert temperature != 1.0
            for other in (0.98 * temperature, 1.02 * temperature):
                assert loss(index, temperature) < loss(index, other)

    def test_without_calibration_temperatures_are_one(self, copy):
        _, policy = quickly(copy, MaxDrop(0.0, calibrate=False))
        assert policy["temperatures"] == [1.0, 1.0, 1.0]


class TestLatency:
    # 2, 3 and 5 ms a stage; without its head the first takes 0.1 ms less, and the second too
    TIMES = SegmentTimes(
        1,
        (1,),
        {
            (0, 0): (2e-3,),
            (0, 1): (4.9e-3,),
            (0, 2): (9.8e-3,),
            (1, 1): (3e-3,),
            (1, 2): (7.9e-3,),
            (2, 2): (5e-3,),
        },
        plain=9e-3,
    )

    @pytest.fixture
    def timed(self, copy, monkeypatch):
        """A copy of the run with stages that take 2, 3 and 5 ms."""
        monkeypatch.setattr(live, "segment_times", lambda *_, **__: self.TIMES)
        return copy

    def expected(self, directory, split, policy) -> float:
        exit_index = slow_outcome(directory, split, policy)["exit_index"]
        first, second = policy["enabled"]
        stages = (2e-3 if first else 1.9e-3, 3e-3 if second else 2.9e-3, 5e-3)
        return sum(sum(stages[: index + 1]) for index in exit_index) / len(exit_index)

    @pytest.mark.parametrize(
        ("goal", "seconds"),
        [(LatencyBudget(0.8, of_plain=True), 7.2e-3), (LatencyBudget(6e-3), 6e-3)],
    )
    def test_a_budget_of_seconds_holds_on_val(self, timed, goal, seconds):
        report, policy = quickly(timed, goal)
        found = report["latency"]
        assert found["budget"] == pytest.approx(seconds)
        assert found["val"] == pytest.approx(self.expected(timed, "val", policy))
        assert found["test"] == pytest.approx(self.expected(timed, "test", policy))
        assert found["val"] <= seconds

    def test_an_exit_that_costs_more_than_it_saves_is_disabled(self, copy, monkeypatch):
        """The first stage takes 90 ms with its head."""
        seconds = {(0, 0): (90e-3,), (1, 1): (3e-3,), (1, 2): (7e-3,)}
        times = dataclasses.replace(self.TIMES, seconds=self.TIMES.seconds | seconds, plain=9.9e-3)
        monkeypatch.setattr(live, "segment_times", lambda *_, **__: times)
        report, policy = quickly(copy, LatencyBudget(1.0, of_plain=True))
        assert policy["enabled"][0] is False
        assert report["latency"]["val"] <= 9.9e-3

    def test_the_page_and_the_screen_name_what_was_measured(self, timed):
        report, _ = evaluate(
            timed,
            TASK,
            LatencyBudget(0.8, of_plain=True),
            overrides=CPU,
            batch_sizes=(4,),
            timing_images=8,
            draw=False,
            name="mine",
        )
        page = (timed / "eval" / "mine" / "report.md").read_text()
        for text in (page, summary(report, timed / "eval" / "mine")):
            assert_names(text, "7.20 ms", "9.00 ms")  # allowed, and of the plain network
            # measured: the batch of the budget is timed too
            measured = report.timing[0]
            assert_names(text, f"{1000 * measured.live.total / measured.batches:.2f} ms")
        assert [timing.batch_size for timing in report.timing] == [1, 4]

    def test_the_fewest_seconds_within_a_drop(self, timed):
        goal = MaxDrop(0.03, minimise="seconds")
        report, policy = quickly(timed, goal)
        found = report["latency"]
        assert (found["batch_size"], found["budget"], found["plain"]) == (1, None, 9e-3)
        for split in ("val", "test"):
            assert found[split] == pytest.approx(self.expected(timed, split, policy))
        assert report["val"]["accuracy"] >= report["exits"][-1]["accuracy_val"] - 0.03 - 1e-9
        other, other_policy = quickly(timed, MaxDrop(0.03), name="macs")
        assert other["latency"] is None
        assert found["val"] <= (1 + NOISE) * self.expected(timed, "val", other_policy)

    def test_where_exits_cost_more_than_they_save_none_is_enabled(self, copy, monkeypatch):
        # every segment takes as long as the whole, as small ones do where a call is what costs
        seconds = dict.fromkeys(self.TIMES.seconds, (9e-3,))
        times = dataclasses.replace(self.TIMES, seconds=seconds)
        monkeypatch.setattr(live, "segment_times", lambda *_, **__: times)
        report, policy = quickly(copy, MaxDrop(0.0, minimise="seconds"))
        assert policy["enabled"] == [False, False]
        assert report["latency"]["val"] == report["latency"]["test"] == 9e-3

    def test_over_cuts_the_expected_speedup_is_reported(self, timed):
        goal = MaxDrop(0.03, minimise="seconds")
        cuts = quickly(timed, goal, val_from="test", cuts=3)[0]["cuts"]
        each = [
            quickly(timed, goal, val_from="test", cut_seed=seed, name=f"{seed}")[0]["latency"]
            for seed in range(3)
        ]
        found = [9e-3 / latency["test"] for latency in each]
        assert cuts["speedup"]["mean"] == pytest.approx(np.mean(found))
        assert cuts["speedup"]["std"] == pytest.approx(np.std(found, ddof=1))
        macs = quickly(timed, MaxDrop(0.03), val_from="test", cuts=2, name="macs")[0]
        assert macs["cuts"]["speedup"] is None

    def test_the_page_says_that_the_fewest_seconds_were_wanted(self, timed):
        quickly(timed, MaxDrop(0.03, minimise="seconds"), name="mine")
        page = (timed / "eval" / "mine" / "report.md").read_text()
        assert_names(page, "fewest seconds", "9.00 ms")

    def test_a_budget_below_the_least_is_refused(self, timed):
        with pytest.raises(UserError) as caught:
            quickly(timed, LatencyBudget(1e-3))
        assert_names(str(caught.value), "1.00 ms", "2.00 ms")  # asked for, and the least


class TestConditionalDeepLearning:
    def test_the_page_and_the_screen_list_the_stages(self, copy):
        report, directory = evaluate(
            copy, TASK, ConditionalDeepLearning(0.6), overrides=CPU, live=False, draw=False
        )
        assert [stage.name for stage in report.cdl] == list(NAMES[:-1])
        admitted = tuple(stage.admitted for stage in report.cdl)
        assert Policy.load(directory / "policy.yaml").enabled == admitted
        for text in ((directory / "report.md").read_text(), summary(report, directory)):
            for stage in report.cdl:
                shares = f"{100 * stage.reached:.1f} %", f"{100 * stage.stopped:.1f} %"
                values = (*shares, f"{100 * stage.gain / PLAIN:.2f} %")
                lines = [line for line in text.splitlines() if f"| {stage.name} |" in line]
                assert any(all(value in line for value in values) for line in lines)
            for row in report.energy:
                assert_names(text, f"{row.test / 1e6:.2f}", f"{row.plain / 1e6:.2f}")
        page = (directory / "report.md").read_text()
        assert re.search(r"stages\b[^.|]*\b100\b", page)  # the val images they were chosen on
        gains = json.loads((directory / "report.json").read_text())["cdl"]
        assert [row["gain"] for row in gains] == [stage.gain for stage in report.cdl]

    def test_other_goals_have_no_stages(self, copy):
        assert quickly(copy, MaxDrop(0.02))[0]["cdl"] is None


class TestGuarantee:
    """Of val's 100 images 20 fit and 80 certify."""

    FIT = np.sort(np.random.default_rng(0).permutation(100)[:20])
    GOAL = Risk(0.15, confidence=0.9)

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, finished, tmp_path_factory):
        directory = shutil.copytree(finished, tmp_path_factory.mktemp("guarantee") / "run")
        return directory, *quickly(directory, cls.GOAL)

    def lost(self, directory, split, policy, rows) -> int:
        """On how many images the full network is right and the policy wrong."""
        pairs = list(zip(*stored(directory, split), strict=True))
        slow = slow_outcome(directory, split, policy)
        full = [exits[-1].index(max(exits[-1])) == target for exits, target in pairs]
        return sum(full[row] and not slow["correct"][row] for row in rows)

    def test_the_policy_file_has_the_guarantee_and_its_evidence(self, found):
        directory, _, policy = found
        guarantee = policy["guarantee"]
        certify = np.setdiff1d(np.arange(100), self.FIT)
        assert (guarantee["risk"], guarantee["confidence"], guarantee["loss"]) == (
            0.15,
            0.9,
            "wrong",
        )
        assert guarantee["images"] == 80
        assert guarantee["losses"] == self.lost(directory, "val", policy, certify)
        assert guarantees.binomial_cdf(80, guarantee["losses"], 0.15) <= 0.1
        assert_names(guarantee["words"], "15 %", "90 %", 80)  # the risk, the confidence, the images

    def test_the_report_has_the_losses_observed_on_test(self, found):
        directory, report, policy = found
        assert report["guarantee"]["words"] == policy["guarantee"]["words"]
        assert report["guarantee"]["lost"] == pytest.approx(
            self.lost(directory, "test", policy, range(120)) / 120
        )

    def test_the_choice_without_the_guarantee_is_reported_beside_it(self, found):
        directory, report, _ = found
        without, _ = quickly(directory, MaxDrop(0.15))
        assert report["guarantee"]["unguaranteed"] == without["test"]
        page = (directory / "eval" / "risk-15-wrong-90-max_prob" / "report.md").read_text()
        assert report["guarantee"]["words"] in page
        assert_names(page, f"{100 * without['test']['accuracy']:.2f} %")

    def test_only_the_fitting_fifth_decides_the_candidates(self, found):
        directory, *_ = found
        val = ExitRecord.load(directory / "records" / "val-off")
        cost = Cost(NAMES, val.info.stage_macs, val.info.head_macs, 0, (0, 0, 0))
        logits = val.logits.copy()
        certify = np.setdiff1d(np.arange(100), self.FIT)
        logits[certify] = np.random.default_rng(1).normal(size=logits[certify].shape)
        policies = [
            choose(record, self.GOAL, cost)
            for record in (val, dataclasses.replace(val, logits=logits))
        ]
        assert policies[0].temperatures == policies[1].temperatures
        fit = val.subset(self.FIT, "val", "")
        scores = score_record(fit, policies[0]).scores[:, :-1]
        for policy in policies:
            assert policy.thresholds[0] in {math.inf, *scores.ravel().tolist()}

    def test_on_average(self, found):
        directory, *_ = found
        _, policy = quickly(directory, Risk(0.15, confidence=None, loss="differs"))
        guarantee = policy["guarantee"]
        assert guarantee["confidence"] is None
        assert (guarantee["losses"] + 1) / 81 <= 0.15

    def test_other_goals_have_no_guarantee(self, copy):
        report, policy = quickly(copy, MaxDrop(0.0))
        assert report["guarantee"] is policy["guarantee"] is None
