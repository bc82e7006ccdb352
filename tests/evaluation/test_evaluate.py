"""Evaluation: no choice depends on test, and the files are written whole or not at all."""

import dataclasses
import errno
import importlib.metadata
import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import GOALS, NAMES, ROUNDING, TASK, quickly, slow_outcome, some_digits, stored
from helpers import CPU, assert_names, few_digits, run_main, tiny_network

from cifar10 import data
from cifar10 import eval as script
from early_exit.choosing.goals import Budget, FixedThresholds, MaxDrop
from early_exit.config import DataConfig
from early_exit.errors import Unavailable
from early_exit.evaluation import evaluate as evaluation
from early_exit.evaluation.evaluate import evaluate
from early_exit.inference.policy import Policy
from early_exit.system import files
from early_exit.task import Task
from early_exit.training import checkpoint

FLAGS = ("--device", "cpu", "--threads", "1", "--no-live", "--no-plots")


class TestHonesty:
    """Nothing that is chosen depends on test."""

    @pytest.fixture
    def with_other_test(self, monkeypatch):
        """A task whose test images are turned upside down and their targets permuted."""
        whole = few_digits(0, 320, 100, 120)
        test = whole.splits["test"]
        order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
        other = data.ImageSet(test.images.flip(2), test.targets[order])
        changed = dataclasses.replace(whole, splits={**whole.splits, "test": other})
        return Task(tiny_network, lambda settings: changed)

    @pytest.mark.parametrize("goal", ["drop 5", "budget 70", "entropy", "patience"])
    def test_the_policy_is_the_same_whatever_test_holds(
        self, finished, tmp_path, with_other_test, goal
    ):
        written = []
        for name, task in (("one", TASK), ("other", with_other_test)):
            directory = shutil.copytree(finished, tmp_path / name)
            shutil.rmtree(directory / "records")
            report, where = evaluate(
                directory, task, GOALS[goal], overrides=CPU, live=False, draw=False
            )
            written.append((where / "policy.yaml").read_bytes())
            final = report.final_accuracy
        assert written[0] == written[1]
        assert final < 0.5  # the other test is really another

    def test_val_and_test_of_a_cut_are_halves_of_test(self, copy):
        report, _ = quickly(copy, MaxDrop(0.0), val_from="test", cut_seed=3)
        assert (report["choice"]["val_images"], report["choice"]["test_images"]) == (60, 60)
        assert_names(report["choice"]["val_from"], "test", 3)

    def test_a_cut_reports_its_own_half_alone(self, copy):
        report, policy = quickly(copy, MaxDrop(0.05), val_from="test", cut_seed=3)
        slow = slow_outcome(copy, "test", policy)
        _, rest = some_digits(DataConfig()).test_halves(3)
        correct = [slow["correct"][index] for index in rest]
        assert report["test"]["accuracy"] == pytest.approx(sum(correct) / 60)

    def test_several_cuts_are_mean_and_deviation_of_each(self, copy):
        goal = MaxDrop(0.02)
        each = [quickly(copy, goal, val_from="test", cut_seed=seed)[0] for seed in (5, 6, 7)]
        report, _ = quickly(copy, goal, val_from="test", cut_seed=5, cuts=3)
        accuracy = [one["test"]["accuracy"] for one in each]
        assert report["cuts"]["count"] == 3
        assert report["cuts"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracy))
        assert report["cuts"]["accuracy"]["std"] == pytest.approx(np.std(accuracy, ddof=1))
        assert report["cuts"]["macs_share"]["mean"] == pytest.approx(
            np.mean([one["test"]["macs_share"] for one in each])
        )
        assert report["test"] == each[0]["test"]
        lost = [one["exits"][-1]["accuracy"] - one["test"]["accuracy"] for one in each]
        assert report["cuts"]["lost"]["mean"] == pytest.approx(np.mean(lost))
        assert report["cuts"]["lost"]["std"] == pytest.approx(np.std(lost, ddof=1))
        page = (copy / "eval").glob("*/report.md")
        assert any("points (mean" in path.read_text() for path in page)


def test_a_plain_network_has_nothing_to_choose(plain):
    """Its report is a point, which others are compared with."""
    report, policy = quickly(plain, MaxDrop(0.005), live=True, draw=True, batch_sizes=(1,))
    logits, targets = stored(plain, "test")
    correct = sum(
        exits[0].index(max(exits[0])) == target
        for exits, target in zip(logits, targets, strict=True)
    )
    assert report["test"] == {"accuracy": correct / len(targets), "macs_share": 1.0}
    assert [row["name"] for row in report["exits"]] == ["final"]
    assert len(report["curve"]) == 1
    assert policy["thresholds"] == []
    # only an image whose best two classes are as close as rounding may get another answer
    gaps = [sorted(exits[0])[-1] - sorted(exits[0])[-2] for exits in logits]
    assert report["live"]["differing"] <= sum(gap < ROUNDING * np.abs(logits).max() for gap in gaps)


class TestFiles:
    @pytest.fixture(scope="class")
    @classmethod
    def written(cls, finished, tmp_path_factory) -> Path:
        """A whole evaluation, exits taken and timed, with plots. Not to be changed."""
        directory = shutil.copytree(finished, tmp_path_factory.mktemp("files") / "run")
        _, where = evaluate(
            directory, TASK, MaxDrop(0.02), overrides=CPU, batch_sizes=(1, 8, 500), timing_images=20
        )
        return where

    def test_the_files(self, written):
        assert {path.name for path in written.iterdir()} == {
            "policy.yaml",
            "report.json",
            "report.md",
            "accuracy_vs_macs.png",
            "gallery.png",
            "confusion.png",
            "overthinking.png",
            "report.html",
        }

    def test_the_directory_is_named_after_the_goal(self, written):
        assert written.name == "max-drop-2-max_prob"
        assert written.parent.name == "eval"

    def test_plots_show_something(self, written):
        from matplotlib import image

        for path in written.glob("*.png"):
            pixels = image.imread(path)
            assert min(pixels.shape[:2]) > 100
            assert pixels[..., :3].std() > 0.01  # something is drawn

    def test_policy_yaml_is_the_policy(self, written):
        policy = Policy.load(written / "policy.yaml")
        assert policy.exit_names == NAMES
        assert policy.criterion == "max_prob"

    def test_report_json_is_strict_json(self, written):
        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        json.loads((written / "report.json").read_text(), parse_constant=refuse)

    def test_report_md_shows_every_exit_and_every_plot(self, written):
        page = (written / "report.md").read_text()
        for name in NAMES:
            assert f"| {name} | " in page
        for path in written.glob("*.png"):
            assert f"]({path.name})" in page

    def test_the_report_names_the_data_the_weights_and_the_versions(self, written):
        report = json.loads((written / "report.json").read_text())
        assert report["run"]["dataset"] == "digits"
        assert_names(report["choice"]["val_from"], "train")
        assert (report["choice"]["val_images"], report["choice"]["test_images"]) == (100, 120)
        assert re.search(r"\b[0-9a-f]{16}\b", report["run"]["weights"])
        assert not re.search(
            r"\bjoint\b", report["run"]["weights"]
        )  # the phase, of an unfinished run
        installed = importlib.metadata.version("torch")
        assert report["environment"]["versions"]["torch"] == installed

    def test_whole_batches_of_at_most_timing_images_are_timed(self, written):
        timing = json.loads((written / "report.json").read_text())["timing"]
        assert [one["batch_size"] for one in timing] == [1, 8]  # 500 is more than there are
        for one in timing:
            assert 0 < one["images"] <= 20
            assert one["images"] % one["batch_size"] == 0
            assert one["live"]["total"] > 0
            assert sum(one["segment_shares"]) == pytest.approx(1)

    def test_without_live_and_plots_there_are_none(self, copy):
        report, _ = quickly(copy, MaxDrop(0.02))
        assert report["live"] is None and report["timing"] == []
        assert not list((copy / "eval").rglob("*.png"))
        assert "![" not in (copy / "eval" / "max-drop-2-max_prob" / "report.md").read_text()

    @pytest.mark.parametrize(
        ("goal", "name"),
        [
            (Budget(0.9), "budget-90-max_prob"),
            (FixedThresholds((0.5, 0.25), criterion="margin"), "thresholds-0.5-0.25-margin"),
            (MaxDrop(0.0, calibrate=False), "max-drop-0-max_prob-uncalibrated"),
            (
                MaxDrop(0.02, minimise="seconds", batch_size=4),
                "max-drop-2-seconds-batch-4-max_prob",
            ),
        ],
    )
    def test_other_goals_have_other_names(self, copy, goal, name):
        quickly(copy, goal)
        assert [path.name for path in (copy / "eval").iterdir()] == [name]

    def test_a_given_name_is_used(self, copy):
        quickly(copy, MaxDrop(0.0), name="mine")
        assert [path.name for path in (copy / "eval").iterdir()] == ["mine"]

    def test_an_earlier_one_of_the_name_is_replaced(self, copy):
        quickly(copy, MaxDrop(0.0), name="mine")
        (copy / "eval" / "mine" / "stray").write_text("old")
        report, _ = quickly(copy, Budget(0.9), name="mine")
        assert_names(report["choice"]["goal"], "budget", 90)
        assert not (copy / "eval" / "mine" / "stray").exists()

    def test_evaluations_of_other_names_stay_as_they_are(self, copy):
        quickly(copy, MaxDrop(0.0), name="mine")
        before = (copy / "eval" / "mine" / "report.json").read_bytes()
        quickly(copy, Budget(0.9), name="other")
        assert (copy / "eval" / "mine" / "report.json").read_bytes() == before

    def test_it_is_in_float32_whatever_training_used(self, copy, monkeypatch, capsys):
        monkeypatch.setattr(script, "TASK", TASK)
        state = checkpoint.load(copy)
        state["config"]["run"]["amp"] = "bf16"
        checkpoint.save(copy, state)
        run_main(script.main, "eval.py", monkeypatch, capsys, copy, "--name", "mine", *FLAGS)
        report = json.loads((copy / "eval" / "mine" / "report.json").read_text())
        assert report["environment"]["precision"] == "float32"

    def test_the_screen_shows_the_table_and_where_the_files_are(self, copy, monkeypatch, capsys):
        monkeypatch.setattr(script, "TASK", TASK)
        code, out, _ = run_main(script.main, "eval.py", monkeypatch, capsys, copy, *FLAGS)
        assert code == 0
        assert "| layer1" in out and "| final | " in out
        assert str(copy / "eval" / "max-drop-0.5-max_prob" / "report.md") in out


class TestWholeOrNotAtAll:
    def visible(self, directory: Path) -> list[str]:
        """The evaluations that a user sees."""
        return [path.name for path in directory.glob("eval/[!.]*")]

    @pytest.mark.parametrize("file", ["policy.yaml", "report.json"])
    def test_if_a_number_cannot_be_written_the_previous_evaluation_is_whole(
        self, copy, monkeypatch, file
    ):
        quickly(copy, MaxDrop(0.0), name="mine")
        before = {path.name: path.read_bytes() for path in (copy / "eval/mine").iterdir()}
        move = files.move

        def full(source, target):
            if target.name == file:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            move(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files, "move", full)
            with pytest.raises(Unavailable, match=str(copy / "eval" / "mine" / file)):
                quickly(copy, Budget(0.9), name="mine")
        after = {path.name: path.read_bytes() for path in (copy / "eval/mine").iterdir()}
        assert after == before
        assert self.visible(copy) == ["mine"]

    def test_two_evaluations_of_one_name_write_one_after_the_other(self, copy, monkeypatch):
        """So neither writes into what the other is about to move into place."""
        original, inside = evaluation.to_json, threading.Lock()
        both, intruding = threading.Event(), threading.Event()
        arrived, lock = [], evaluation.locked

        def asking(*arguments, **options):
            arrived.append(1)
            if len(arrived) == 2:
                both.set()
            return lock(*arguments, **options)

        def slowly(report):
            if not inside.acquire(blocking=False):
                intruding.set()
                raise AssertionError("the other one is writing")
            try:
                assert both.wait(600)  # until the other one asks for the lock
                assert not intruding.wait(0.3)  # and, if the lock did not hold, gets here
                return original(report)
            finally:
                inside.release()

        monkeypatch.setattr(evaluation, "locked", asking)
        monkeypatch.setattr(evaluation, "to_json", slowly)
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(quickly, copy, MaxDrop(0.0), name="one") for _ in range(2)]
            (one, _), (two, _) = (job.result() for job in jobs)
        assert one["test"] == two["test"]
        assert {path.name for path in (copy / "eval").iterdir()} == {"one"}
