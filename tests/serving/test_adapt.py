"""Cheaper policies for a long queue: which are allowed, and when they are used."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_segments import POLICY
from helpers import assert_names

from early_exit.errors import UserError
from early_exit.inference.policy import NEVER, Policy
from early_exit.serving.adapt import (
    PRIOR,
    STEPS,
    Adapter,
    ValPoint,
    curve_policies,
    segment_shares,
    val_point,
)
from early_exit.serving.load import LoadState


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
    segments = [SimpleNamespace(last=0), SimpleNamespace(last=2)]
    return SimpleNamespace(val=val, val_curve=curve, segments=segments)


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

    def test_the_shares_of_segments(self):
        """The exit in the middle is disabled: there are two segments."""
        shares = segment_shares(model(), curve_policies(model(), CHOSEN, 0.01))
        assert shares == pytest.approx(np.array([[0.2, 0.8], [0.3, 0.7]]))

    def test_a_model_without_shares_is_refused(self):
        old = model([{**row(0.9, 0.905, 0.8), "exit_shares": None}])
        with pytest.raises(UserError) as caught:
            segment_shares(old, [CHOSEN])
        assert_names(str(caught.value), "--adapt", "export")


class TestWhenToChange:
    """A target of 1 s and a hold of 10 s. A row takes no time in the first segment and 10 ms in the
    second, which all, half and a quarter of the rows reach under the three policies."""

    POLICIES = tuple(CHOSEN.with_threshold(value) for value in (0.9, 0.8, 0.7))
    SHARES = np.array([[0, 1], [0.5, 0.5], [0.75, 0.25]])

    @pytest.fixture
    def adapter(self):
        return Adapter(self.POLICIES, self.SHARES, target=1.0, hold=10.0)

    def state(self, arrived, waiting=0, policy=0, max_rows=10**6, seconds=0.01, remaining=()):
        """The rows that have arrived, and that wait for the first segment under a policy."""
        thresholds = self.POLICIES[policy].thresholds
        return LoadState(
            arrived,
            {thresholds: (waiting, 0)},
            np.array([0.0, seconds]),
            waiting / max_rows,
            dict(remaining),
        )

    def begin(self, adapter, rate):
        """Rows arrive at this rate from -1 s on; none waits at 0 s."""
        assert adapter.step(self.state(0), -1) is None
        assert adapter.step(self.state(rate), 0) is None

    @pytest.mark.parametrize(
        ("rate", "waiting", "expected"),
        [
            (150, 50, None),  # half of the target
            (150, 60, 1),  # after a second 1.1 s of work, or 0.35 s
            (300, 60, 2),  # 2.6 s, 1.1 s or 0.35 s
            (900, 60, 2),  # 3.1 s under the last one
            (60, 60, None),  # 0.2 s: a burst
            (110, 60, 1),  # 0.7 s
            (90, 60, None),  # 0.5 s
        ],
    )
    def test_the_first_policy_that_is_enough_at_once(self, adapter, rate, waiting, expected):
        self.begin(adapter, rate)
        found = adapter.step(self.state(2 * rate, waiting), 1)
        assert found == (None if expected is None else self.POLICIES[expected])

    def test_nothing_changes_before_a_run(self, adapter):
        assert adapter.step(self.state(0, seconds=0.0), 0) is None
        assert adapter.step(self.state(900, 900, seconds=0.0), 0) is None
        assert adapter.step(self.state(1800, 1800, seconds=0.0), 1) is None

    def test_rows_that_wait_take_what_their_own_policy_takes(self, adapter):
        self.begin(adapter, 300)
        assert adapter.step(self.state(600, 60, policy=2), 1) is None
        assert adapter.wait == pytest.approx(60 * 0.25 * 0.01)
        assert adapter.rate == 300

    def test_rows_of_an_unknown_policy_take_what_the_chosen_one_takes(self, adapter):
        state = replace(self.state(0), waiting={(0.1, 0.1): (3, 2)})
        adapter.step(state, 0)
        assert adapter.wait == pytest.approx(0.05)

    def test_recent_runs_count_beside_val(self, adapter):
        """Of 150 rows 10 remained, of val half."""
        runs = {self.POLICIES[1].thresholds: np.array([[150, 10], [10, 0]])}
        adapter.step(self.state(0, waiting=1, policy=1, remaining=runs), 0)
        assert adapter.wait == pytest.approx((10 + PRIOR / 2) / (150 + PRIOR) * 0.01)

    def test_a_queue_that_is_nearly_full_is_long(self, adapter):
        self.begin(adapter, 150)
        assert adapter.step(self.state(300, 40, max_rows=80), 1) is None
        assert adapter.step(self.state(450, 41, max_rows=80), 2) == self.POLICIES[1]

    def test_back_after_the_hold(self, adapter):
        self.begin(adapter, 150)
        assert adapter.step(self.state(300, 60), 1) == self.POLICIES[1]
        found = [adapter.step(self.state(300), now) for now in (2, 6, 10.9, 11, 12)]
        assert found == [None, None, None, self.POLICIES[0], None]

    def test_not_while_the_chosen_policy_would_not_be_enough(self, adapter):
        """The cheaper policy has no queue, the chosen one would have."""
        self.begin(adapter, 150)
        assert adapter.step(self.state(300, 60), 1) == self.POLICIES[1]
        assert not any(adapter.step(self.state(150 * now + 150), now) for now in range(2, 41))
        found = [adapter.step(self.state(6150), now) for now in (41, 49, 50)]
        assert found == [None, None, self.POLICIES[0]]

    def test_a_burst_at_the_start_is_no_rate(self, adapter):
        """In the first look's tenth of a second; at 600 rows/s only the last policy were enough."""
        adapter.step(self.state(0), 0)
        assert adapter.step(self.state(60, 60), 0.1) is None
        assert adapter.rate == 30

    def test_one_policy_never_changes(self):
        adapter = Adapter(self.POLICIES[:1], self.SHARES[:1], target=1.0)
        assert adapter.step(self.state(0), 0) is None
        assert adapter.step(self.state(900, 900), 1) is None
        assert adapter.step(self.state(900), 100) is None
