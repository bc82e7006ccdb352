"""The phases of a regime, and the loss weights of each."""

import pytest

from early_exit.config import (
    BackbonePhaseConfig,
    Config,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from early_exit.errors import UserError
from early_exit.training.phases import Phase, plan_phases


class TestPlan:
    """Which phases a regime has; the loss weights of each."""

    optim = OptimConfig(epochs=7, lr=0.3)

    def plan(self, regime, num_exits=3, backbone=None, weights=None, **phase) -> list[Phase]:
        config = Config(
            model=ModelConfig(backbone=backbone),
            optim=self.optim,
            backbone_phase=BackbonePhaseConfig(**phase),
            loss=LossConfig(weights=weights),
            run=RunConfig(regime=regime),
        )
        return plan_phases(config, num_exits)

    def test_joint(self):
        assert self.plan("joint") == [Phase("joint", self.optim, (1.0, 1.0, 1.0))]

    def test_a_plain_network_has_one_phase_whatever_the_regime(self):
        for regime in ("joint", "mixed", "frozen"):
            assert self.plan(regime, num_exits=1) == [Phase("plain", self.optim, (1.0,))]

    def test_mixed_trains_the_backbone_first_with_its_own_epochs_and_rate(self):
        first, second = self.plan("mixed", epochs=2, lr=0.01)
        assert (first.name, first.optim.epochs, first.optim.lr) == ("backbone", 2, 0.01)
        assert first.weights == (1.0,) and first.backbone_only
        assert second == Phase("joint", self.optim, (1.0, 1.0, 1.0))

    def test_the_first_phase_has_the_settings_of_the_second_by_default(self):
        first, second = self.plan("mixed")
        assert first.optim == second.optim

    def test_frozen_trains_the_heads_last(self):
        first, second = self.plan("frozen")
        assert (first.name, second.name) == ("backbone", "heads")
        assert second.backbone_frozen and not first.backbone_frozen
        assert second.weights == (1.0, 1.0, 0.0)

    @pytest.mark.parametrize(("regime", "name"), [("mixed", "joint"), ("frozen", "heads")])
    def test_a_given_backbone_skips_the_first_phase(self, regime, name):
        (phase,) = self.plan(regime, backbone="file.pt")
        assert phase.name == name

    def test_one_weight_per_exit(self):
        (phase,) = self.plan("joint", weights=(0.2, 0.3, 2.0))
        assert phase.weights == (0.2, 0.3, 2.0)

    def test_one_weight_per_early_exit_gives_the_final_exit_the_rest(self):
        (phase,) = self.plan("joint", weights=(0.25, 0.25))
        assert phase.weights == (0.25, 0.25, 0.5)

    def test_frozen_with_heads_of_no_weight_is_refused(self):
        with pytest.raises(UserError, match=r"weights.*\b0\b"):
            self.plan("frozen", weights=(0.0, 0.0, 1.0))
