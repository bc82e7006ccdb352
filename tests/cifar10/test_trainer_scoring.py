"""The CIFAR trainer with -e: the accuracy of every exit, without training."""

import re

import pytest
import torch
from helpers import (
    TINY,
    accuracy_bounds,
    assert_accuracy,
    assert_names,
)

from early_exit.training import checkpoint
from early_exit.training import score as scoring


class TestEvaluate:
    def test_it_is_in_float32_unless_asked(self, run, joint, monkeypatch):
        asked = []
        monkeypatch.setattr(
            scoring,
            "set_up",
            lambda settings: asked.append(settings.amp) or (torch.device("cpu"), "off"),
        )
        run("-e", "--resume", joint)
        run("-e", "--resume", joint, "--amp", "bf16")
        assert asked == ["off", "bf16"]

    def shown(self, out: str) -> dict[str, float]:
        """The accuracies printed, by exit."""
        rows = re.findall(r"\b(layer1|layer2|final)\b\D*?([\d.]+) ?%", out)
        return {name: float(percent) / 100 for name, percent in rows}

    def printed(self, bounds: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """Bounds as they are printed: in hundredths of a percent."""
        return {name: (round(low, 4), round(high, 4)) for name, (low, high) in bounds.items()}

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_every_exit_of_a_run(self, run, joint, split):
        code, out, _ = run("-e", "--resume", joint, "--split", split)
        assert code == 0
        assert_names(out, split)
        assert_accuracy(self.shown(out), self.printed(accuracy_bounds(joint, split)))

    def test_val_is_the_default(self, run, joint):
        assert run("-e", "--resume", joint) == run("-e", "--resume", joint, "--split", "val")

    def test_a_backbone_alone(self, run, plain):
        code, out, _ = run(*TINY, "-e", "--backbone", plain, "--exits", "none", "--split", "test")
        assert code == 0
        assert_accuracy(self.shown(out), self.printed(accuracy_bounds(plain, "test")))

    def test_weights_that_may_have_seen_val_are_warned_of(self, run, plain, tmp_path, caplog):
        torch.save(checkpoint.load_backbone(plain, {})[0], tmp_path / "public.th")
        flags = (*TINY, "-e", "--exits", "none", "--backbone", tmp_path / "public.th")
        assert run(*flags)[0] == 0
        (warning,) = caplog.messages
        assert_names(warning, "val", "--split test")
        caplog.clear()
        assert run(*flags, "--split", "test")[0] == 0
        assert caplog.text == ""

    def test_weights_that_have_not_seen_val_are_not(self, run, joint, plain, caplog):
        assert run("-e", "--resume", joint)[0] == 0
        assert run(*TINY, "-e", "--exits", "none", "--backbone", plain)[0] == 0
        assert caplog.text == ""

    def test_it_trains_nothing_and_writes_nothing(self, run, joint):
        before = {path: path.stat().st_mtime_ns for path in joint.rglob("*")}
        run("-e", "--resume", joint)
        assert {path: path.stat().st_mtime_ns for path in joint.rglob("*")} == before

    def test_other_exits_than_the_runs_are_refused(self, error, joint):
        message = error("-e", "--resume", joint, "--exits", "layer1")
        assert "heads.layer2" in message and "--exits" in message

    def test_an_unfinished_run_is_told(self, run, joint, tmp_path, caplog):
        state = checkpoint.load(joint)
        position = {"phase": 0, "epoch": 1, "step": 0}
        torch.save({**state, "position": position}, tmp_path / "early.pt")
        for path, told in ((tmp_path / "early.pt", True), (joint, False)):
            caplog.clear()
            assert run("-e", "--resume", path)[0] == 0
            assert ("epoch 1 of 2, phase joint" in caplog.text) == told
