"""eval.py: errors of the user end in one line that names what was wrong."""

import pytest
from by_hand import MACS, PLAIN, TASK
from helpers import assert_names, few_digits, run_main, tiny_network

from cifar10 import eval as script
from early_exit.inference.criteria import CRITERIA
from early_exit.task import Task
from early_exit.training import checkpoint

FLAGS = ("--device", "cpu", "--threads", "1", "--no-live", "--no-plots")


class TestRefusals:
    @pytest.fixture
    def refusal(self, monkeypatch, capsys):
        """Runs eval.py, which must end in one line; returns it without the program's name."""
        monkeypatch.setattr(script, "TASK", TASK)

        def call(*arguments) -> str:
            code, _, err = run_main(script.main, "eval.py", monkeypatch, capsys, *arguments, *FLAGS)
            assert code == 2
            assert err.startswith("eval.py: ")
            assert err.count("\n") == 1
            return err.removeprefix("eval.py: ").rstrip("\n")

        return call

    @pytest.mark.parametrize(
        "goals", [("--max-drop", "1", "--budget", "50"), ("--budget", "50", "--thresholds", "0.5")]
    )
    def test_two_goals(self, refusal, copy, goals):
        assert_names(refusal(copy, *goals), *goals[::2])

    def test_a_budget_below_the_least(self, refusal, copy):
        message = refusal(copy, "--budget", "10")
        assert_names(message, f"{MACS[0] / 1e6:.2f} M", f"{0.1 * PLAIN / 1e6:.2f} M")
        assert not (copy / "eval").exists()

    def test_too_few_images_for_a_risk(self, refusal, copy):
        message = refusal(copy, "--risk", "1")
        assert_names(message, 80, "1 %", "95 %", 299)  # 0.99 ** 298 > 0.05 > 0.99 ** 299

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (("--confidence", "90"), ["--confidence", "--risk"]),
            (("--on-average",), ["--on-average", "--risk"]),
            (("--risk", "5", "--on-average", "--confidence", "90"), ["--on-average"]),
            (("--latency-budget", "3"), ["--latency-budget", "'3'", "3ms", "60%"]),
            (("--latency-budget", "x%"), ["--latency-budget", "'x%'", "3ms", "60%"]),
            (("--latency-budget=-3ms",), ["--latency-budget"]),
            (("--latency-budget", "3ms", "--latency-batch", "500"), [100, "--latency-batch", 500]),
            (("--policy", "x", "--criterion", "margin"), ["--policy"]),
            (("--policy", "x", "--no-calibration"), ["--policy"]),
            (("--thresholds=-inf",), ["threshold"]),
            (("--policy", "no.yaml"), ["no.yaml"]),
            (("--epsilon", "1"), ["--epsilon", "--delta"]),
            (("--latency-batch", "4"), ["--latency-batch", "--latency-budget"]),
            (("--delta", "0.3"), ["--delta", 0.3, 0.5]),
            (("--delta", "0.9", "--criterion", "margin"), ["--delta", "--criterion margin"]),
            (("--risk", "100"), ["--risk", 100]),
            (("--risk", "5", "--confidence", "100"), ["--confidence", 100]),
        ],
    )
    def test_flags_of_a_goal(self, refusal, copy, flags, named):
        assert_names(refusal(copy, *flags), *named)

    def test_branchynets_t_without_its_minus(self, refusal, copy):
        message = refusal(copy, "--criterion", "entropy", "--thresholds", "0.3")
        assert_names(message, "entropy", "--thresholds=-0.3")

    def test_patience_with_one_early_exit(self, refusal, one_exit):
        message = refusal(one_exit, "--criterion", "patience")
        assert_names(message, "patience")

    def test_cuts_of_a_val_that_is_not_from_test(self, refusal, copy):
        for flags in (("--cuts", "3"), ("--cut-seed", "1")):
            assert_names(refusal(copy, *flags), flags[0], "--val-from test")

    def test_thresholds_that_do_not_fit_the_exits(self, refusal, copy):
        assert_names(refusal(copy, "--thresholds", "0.1", "0.2", "0.3"), "thresholds", 3, 2)

    def test_an_unknown_criterion(self, refusal, copy):
        message = refusal(copy, "--criterion", "oracle")
        assert_names(message, *CRITERIA)

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (("--max-drop", "101"), ["--max-drop", 101, 100]),
            (("--max-drop=-1",), ["--max-drop", -1, 100]),
            (("--budget", "0"), ["--budget", 0]),
            (("--cuts", "0"), ["--cuts", 1, 0]),
            (("--batch-sizes", "4", "0"), ["--batch-sizes", 1, 0]),
            (("--timing-images", "0"), ["--timing-images", 1, 0]),
            (("--thresholds", "nan"), ["threshold"]),
            (("--thresholds", "1.5"), ["--thresholds", "max_prob", 1.5, 1]),
        ],
    )
    def test_numbers_out_of_range(self, refusal, copy, flags, named):
        assert_names(refusal(copy, *flags), *named)

    def test_a_negative_seed(self, refusal, copy):
        assert "seed" in refusal(copy, "--val-from", "test", "--cut-seed=-1")

    def test_a_run_that_is_missing(self, refusal, tmp_path):
        message = refusal(tmp_path / "none")
        assert_names(message, tmp_path / "none")

    def test_a_run_without_a_checkpoint(self, refusal, tmp_path):
        assert_names(refusal(tmp_path), tmp_path)

    def test_data_that_hold_out_other_images(self, refusal, copy, monkeypatch):
        other = Task(tiny_network, lambda settings: few_digits(1, 320, 100, 120))
        monkeypatch.setattr(script, "TASK", other)
        hashes = (few_digits(seed, 320, 100, 120).val_hash for seed in (0, 1))
        assert_names(refusal(copy), copy, *hashes, "--data")

    @pytest.mark.parametrize("name", [".", "..", "../../precious", "a/b", "/precious"])
    def test_a_name_with_a_path_is_refused_and_nothing_is_lost(self, refusal, copy, tmp_path, name):
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").write_text("mine")
        name = str(precious) if name.startswith("/") else name
        assert "--name" in refusal(copy, "--name", name)
        assert (precious / "file").exists()
        assert (copy / checkpoint.NAME).exists()
