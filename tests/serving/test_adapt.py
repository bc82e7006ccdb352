"""Cheaper policies for a long queue: which are allowed, and when they are used."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_segments import POLICY
from helpers import assert_names

from early_exit.errors import UserError
from early_exit.inference.policy import NEVER, Policy
from early_exit.serving.adapt import STEPS, Adapter, ValPoint, curve_policies, val_point


def row(threshold, accuracy, macs_share):
    shares = [1 - macs_share, 0.0, macs_share]
    return {
        "threshold": threshold,
        "accuracy": accuracy,
        "macs_share": macs_share,
        "exit_shares": shares,
    }


# accuracy does not fall evenly: 0.5 loses less than 0.6
CURVE = [
    row(None, 0.900, 1.0),
    row(0.9, 0.905, 0.8),
    row(0.8, 0.895, 0.7),
    row(0.6, 0.880, 0.6),
    row(0.5, 0.890, 0.5),
    row(0.3, 0.800, 0.3),
]
CHOSEN = POLICY.with_threshold(0.9)


def model(curve=CURVE, policy=CHOSEN, accuracy=0.905, macs_share=0.8):
    """The manifest of a model whose policy gave this on val."""
    val = {
        "thresholds": [None if value == NEVER else value for value in policy.thresholds],
        "temperatures": list(policy.temperatures),
        "accuracy": accuracy,
        "macs_share": macs_share,
    }
    return SimpleNamespace(val=val, val_curve=curve)


def thresholds(policies):
    return [policy.shared_threshold for policy in policies]


class TestWhatIsAllowed:
    @pytest.mark.parametrize(
        ("max_drop", "expected"),
        [
            (0.0, [0.9]),
            (0.01, [0.9, 0.8]),
            (0.02, [0.9, 0.8, 0.5]),  # 0.6 loses 0.025
            (0.03, [0.9, 0.8, 0.6, 0.5]),
            (1.0, [0.9, 0.8, 0.6, 0.5, 0.3]),
        ],
    )
    def test_no_policy_loses_more_than_the_largest_drop(self, max_drop, expected):
        assert thresholds(curve_policies(model(), CHOSEN, max_drop)) == expected

    def test_only_cheaper_policies(self):
        found = curve_policies(model(), CHOSEN.with_threshold(0.5), 0.5)
        assert thresholds(found) == [0.5, 0.3]

    def test_at_most_a_dozen_evenly_in_cost(self):
        curve = [row(at / 1000, 0.9, 0.2 + at / 1000) for at in range(600, 0, -1)]
        own = POLICY.with_threshold(0.6)
        policies = curve_policies(model(curve, own), own, 0.1)
        assert len(policies) == STEPS + 1
        assert thresholds(policies)[1:-1] == pytest.approx(
            [0.6 - (0.6 - 0.001) * step / STEPS for step in range(1, STEPS)], abs=1e-3
        )
        assert thresholds(policies)[-1] == 0.001

    def test_everything_but_thresholds_stays(self):
        own = Policy(
            exit_names=("a", "b", "final"),
            thresholds=(0.9, 0.4),
            temperatures=(1.5, 2.0, 1.0),
            enabled=(True, False),
        )
        policies = curve_policies(model(policy=own), own, 1.0)
        assert policies[0] is own
        for policy in policies[1:]:
            assert replace(policy, thresholds=own.thresholds) == own

    def test_thresholds_that_differ_from_exit_to_exit(self):
        own = replace(POLICY, thresholds=(0.95, 0.6))
        assert val_point(model(policy=own), own) == ValPoint(0.905, 0.8, None, None)
        assert thresholds(curve_policies(model(policy=own), own, 0.01)) == [None, 0.8]

    def test_the_shares_of_the_chosen_policy(self):
        own = replace(POLICY, thresholds=(0.95, 0.6))
        manifest = model(policy=own)
        manifest.val |= {"exit_shares": [0.5, 0.2, 0.3], "images": 180}
        assert val_point(manifest, own) == ValPoint(0.905, 0.8, (0.5, 0.2, 0.3), 180)

    @pytest.mark.parametrize(
        "changed",
        [
            CHOSEN.with_threshold(0.85),
            replace(CHOSEN, thresholds=(0.9, 0.8)),
            replace(CHOSEN, temperatures=(1.0, 1.0, 2.0)),
        ],
        ids=["a threshold", "one of two", "a temperature"],
    )
    def test_a_policy_of_unknown_accuracy_is_refused(self, changed):
        assert val_point(model(), changed) is None
        with pytest.raises(UserError) as caught:
            curve_policies(model(), changed, 0.1)
        assert_names(str(caught.value), "val_curve")

    def test_a_model_without_the_numbers_is_refused(self):
        old = SimpleNamespace(val={}, val_curve=[{"threshold": 0.9}])
        with pytest.raises(UserError):
            curve_policies(old, CHOSEN, 0.1)

    def test_an_impossible_drop_is_refused(self):
        with pytest.raises(UserError) as caught:
            curve_policies(model(), CHOSEN, 2.0)
        assert_names(str(caught.value), "--max-drop", 200)

    def test_what_val_gave(self):
        never = CHOSEN.with_threshold(NEVER)
        assert val_point(model(), never) == ValPoint(0.9, 1.0, (0.0, 0.0, 1.0), None)
        assert val_point(model(), CHOSEN.with_threshold(0.3)).accuracy == 0.8


class TestWhenToChange:
    POLICIES = tuple(CHOSEN.with_threshold(value) for value in (0.9, 0.8, 0.7))

    def changes(self, *steps):
        """The threshold of each change, None for no change; steps: expected wait and time, for a
        target of 1 s and a hold of 10 s."""
        adapter = Adapter(self.POLICIES, target=1.0, hold=10.0)
        found = [adapter.step(*step) for step in steps]
        return [policy and policy.shared_threshold for policy in found]

    def test_one_step_cheaper_beyond_the_target(self):
        assert self.changes((0.9, 0), (1.0, 1), (1.1, 2)) == [None, None, 0.8]

    def test_the_next_step_when_the_last_one_could_show(self):
        assert self.changes((2, 0), (2, 0.5), (2, 1.0), (9, 5)) == [0.8, None, 0.7, None]

    def test_back_when_the_wait_stayed_short(self):
        steps = [(2, 0), (2, 1), (0.4, 2), (0.4, 11.9), (0.4, 12), (0, 21), (0, 22), (0, 40)]
        assert self.changes(*steps) == [0.8, 0.7, None, None, 0.8, None, 0.9, None]

    def test_a_wait_of_half_the_target_starts_the_hold_again(self):
        steps = [(2, 0), (0.4, 1), (0.5, 10), (0.4, 11), (0.4, 20), (0.4, 21)]
        assert self.changes(*steps) == [0.8, None, None, None, None, 0.9]

    def test_one_policy_never_changes(self):
        adapter = Adapter(self.POLICIES[:1], target=1.0)
        assert adapter.step(5, 0) is None
        assert adapter.step(0, 100) is None
