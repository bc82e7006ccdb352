"""The rule that chooses the policy under load, against queues on a virtual clock.

The first segment takes 1 ms a row and the second 2 ms; under the chosen policy half of the rows
exit at the first, so it answers 500 rows a second; the cheapest, under which all do, answers 1,000.
"""

import numpy as np
import pytest
from fake_segments import POLICY
from simulated_server import SimulatedServer, poisson

from early_exit.inference.policy import Policy
from early_exit.serving.adapt import HOLD, Adapter

CAPACITY, TARGET = 500, 0.25
STEPS = 10
EXITED = np.linspace(0.5, 1, STEPS + 1)
SHARES = np.stack([EXITED, 1 - EXITED], axis=1)
POLICIES = [
    Policy(exit_names=POLICY.exit_names[1:], thresholds=(0.9 - step / 20,))
    for step in range(STEPS + 1)
]


def server(policies=slice(None), shares=SHARES, seconds=(0.001, 0.002), **settings):
    """A server with some of the policies."""
    adapter = Adapter(POLICIES[policies], SHARES[policies], TARGET)
    return SimulatedServer(adapter, shares[policies], seconds, **settings)


@pytest.mark.parametrize("policies", [slice(None), slice(None, None, STEPS)], ids=["11", "2"])
def test_an_overload_keeps_the_target_and_ends(policies):
    """Half of the capacity, from second 5 to 15 1.5 times, and half again. The queue grows by half
    a second each second, so it is half the target after one target, when the policy begins to
    change. After two more the rate is known. Both are forgotten two targets after the overload."""
    one = server(policies)
    times = np.concatenate(
        [
            poisson(0.5 * CAPACITY, 0, 5, seed=1),
            poisson(1.5 * CAPACITY, 5, 15, seed=2),
            poisson(0.5 * CAPACITY, 15, 30, seed=3),
        ]
    )
    latency, index = one.run(times, until=32)
    overloaded = (times >= 5 + TARGET) & (times < 15)
    assert np.quantile(latency[overloaded], 0.99) < TARGET
    assert not index[times < 5].any()
    assert index[(times >= 5 + 2 * TARGET) & (times < 15)].all()
    assert not index[times > 15 + 3 * TARGET + HOLD].any()
    assert one.changes[-1][0] >= 15 + HOLD - TARGET


def test_what_is_given_up_is_what_the_overload_needs():
    """At 1.2 times the capacity a row may cost 1 / 1.2 of the chosen policy's; the last policy
    costs half. Chance makes the rule choose cheaper ones for a while, but on average less than half
    way to the last one."""
    times = poisson(1.2 * CAPACITY, 0, 40, seed=1)
    latency, index = server().run(times, until=42)
    assert np.quantile(latency, 0.99) < TARGET
    cost = 1 - index.mean() / STEPS / 2
    assert (1 / 1.2 + 0.5) / 2 < cost < 1 / 1.2 + 0.05


@pytest.mark.parametrize("seed", range(3))
def test_chance_below_capacity_changes_nothing(seed):
    """At 0.9 of the capacity the work that waits exceeds x with probability exp(-2 (1 - 0.9) x / v)
    (Kingman), v = 450 (0.5 (1 ms)^2 + 0.5 (3 ms)^2) = 2.25 ms: 1.5e-5 for half the target. One such
    excursion lasts about v / (2 (1 - 0.9)^2) = 0.11 s, so that there is one in two hours."""
    one = server()
    _, index = one.run(poisson(0.9 * CAPACITY, 0, 30, seed), until=30)
    assert not index.any() and not one.changes


def test_a_burst_that_is_answered_within_the_target_changes_nothing():
    """A quarter of the capacity, and each second 85 rows at once, 0.68 of the target."""
    bursts = np.repeat(np.arange(1, 20), 85)
    times = np.sort(np.concatenate([poisson(0.25 * CAPACITY, 0, 20, seed=1), bursts]))
    one = server()
    one.run(times, until=21)
    assert not one.changes


def test_an_overload_beyond_the_cheapest_policy_uses_the_cheapest_and_refuses():
    """Of three times the capacity the cheapest policy answers two thirds."""
    one = server(max_rows=200)
    times = poisson(3 * CAPACITY, 0, 5, seed=1)
    latency, index = one.run(times, until=10)
    assert one.changes[0][0] < TARGET
    assert set(index[times > TARGET]) == {STEPS}
    assert np.isfinite(latency).mean() == pytest.approx(2 / 3, abs=0.06)


def test_a_small_limit_of_rows_does_not_hide_an_overload():
    """60 rows are 0.12 s of work: less than half the target."""
    one = server(max_rows=60)
    times = poisson(1.6 * CAPACITY, 0, 10, seed=1)
    latency, index = one.run(times, until=11)
    assert index[times > TARGET].all()
    assert np.isfinite(latency[times > 2 * TARGET]).mean() > 0.99


def test_small_batches_of_an_idle_server_do_not_look_like_load():
    """A run takes 10 ms and little more for each row, so a server with few rows is always busy and
    could still answer ten times as many. After an overload the chosen policy returns."""
    one = server(seconds=(0.0001, 0.0002), fixed=0.01, max_batch=64)
    times = np.concatenate(
        [
            poisson(500, 0, 5, seed=1),
            poisson(4500, 5, 7, seed=2),
            poisson(500, 7, 20, seed=3),
        ]
    )
    _, index = one.run(times, until=21)
    assert not index[times < 5].any()
    assert index[(times > 5 + TARGET) & (times < 7)].all()
    assert not index[times > 8 + HOLD].any()


def test_traffic_that_is_easier_than_val_returns_to_the_chosen_policy():
    """By val's shares it would be at its capacity, by its own it is at 0.75 of it."""
    easier = np.stack([0.5 + EXITED / 2, 0.5 - EXITED / 2], axis=1)
    one = server(shares=easier)
    times = np.concatenate([poisson(2 * CAPACITY, 0, 2, seed=1), poisson(CAPACITY, 2, 20, seed=2)])
    _, index = one.run(times, until=21)
    assert index[(times > 1) & (times < 2)].all()
    assert not index[times > 15].any()
