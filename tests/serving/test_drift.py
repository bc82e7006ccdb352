"""Whether traffic looks like val: the distance, what it is by chance, and the gauges."""

import dataclasses
import math

import numpy as np
import pytest
from fakes import SHAPE, call, colour_model

from early_exit.inference.policy import Policy
from early_exit.serving.drift import FALSE_ALARM, Window, distance, distance_by_chance

POLICY = Policy(exit_names=("layer1", "final"), thresholds=(0.9,))
OTHER = POLICY.with_threshold(0.5)


@pytest.mark.parametrize(
    ("counts", "val_shares", "expected"),
    [
        ([5, 5], [0.5, 0.5], 0.0),
        ([10, 0], [0.25, 0.75], 0.75),
        ([2, 1, 1], [0.25, 0.25, 0.5], 0.25),
        ([0, 4], [1.0, 0.0], 1.0),
    ],
)
def test_the_distance(counts, val_shares, expected):
    assert distance(counts, val_shares) == pytest.approx(expected, abs=1e-15)


class TestByChance:
    def test_values_worked_out_by_hand(self):
        assert FALSE_ALARM == 1e-3  # sqrt(ln(1000) / 2) is 1.85847
        assert distance_by_chance(2, 1000, None) == pytest.approx(2.35847 / math.sqrt(1000), 1e-5)
        assert distance_by_chance(5, 100, None) == pytest.approx(0.285847, 1e-5)
        assert distance_by_chance(5, 200, 200) == pytest.approx(0.285847, 1e-5)

    @pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1], [0.4, 0.3, 0.3]])
    def test_what_is_like_val_stays_below_and_what_is_not_does_not(self, shares):
        rng, rows, val_images = np.random.default_rng(0), 1000, 5000
        most = distance_by_chance(len(shares), rows, val_images)
        val = rng.multinomial(val_images, shares, 2000) / val_images
        live = rng.multinomial(rows, shares, 2000)
        assert max(map(distance, live, val)) <= most
        moved = np.array([shares[0] - 0.2, shares[1] + 0.2, *shares[2:]])
        assert min(map(distance, rng.multinomial(rows, moved, 2000), val)) > most


class TestWindow:
    def test_it_is_given_when_it_is_full(self):
        window = Window(4)
        window.add(POLICY, [0, 0, 1])
        assert window.counts(POLICY) is None
        window.add(POLICY, [0])
        assert window.counts(POLICY).tolist() == [3, 1]

    def test_it_forgets_the_oldest(self):
        window = Window(4)
        window.add(POLICY, [0, 0, 0, 1, 1, 1])
        assert window.counts(POLICY).tolist() == [1, 3]

    def test_it_begins_anew_under_another_policy(self):
        window = Window(2)
        window.add(POLICY, [0, 0])
        assert window.counts(OTHER) is None
        window.add(OTHER, [1])
        assert window.counts(OTHER) is window.counts(POLICY) is None
        window.add(OTHER, [1])
        assert window.counts(OTHER).tolist() == [0, 2]


class TestGauges:
    """Half of val exits at layer1; images are red, which exit at layer1, or grey."""

    @pytest.fixture
    def model(self):
        model = colour_model()
        val = {"thresholds": [0.9], "temperatures": [1.0, 1.0], "accuracy": 0.8, "macs_share": 0.8}
        val |= {"exit_shares": [0.5, 0.5], "images": 1000}
        return dataclasses.replace(model, manifest=dataclasses.replace(model.manifest, val=val))

    @pytest.fixture
    def app(self, make_service):
        from early_exit.serving.app import build_app

        service = make_service(max_rows=1000, max_images=1000, max_body=2**20)
        return build_app(service)

    def send(self, app, red: int, grey: int) -> dict[str, str]:
        """Sends as many images of each kind, and gives the gauges."""
        images = np.full((red + grey, *SHAPE), 90, np.uint8)
        images[:red] = np.array([250, 0, 0], np.uint8).reshape(3, 1, 1)
        one = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
        body = {"inputs": [one | {"data": images.ravel().tolist()}], "outputs": [{"name": "exit"}]}
        sent = {"method": "POST", "url": "/v2/models/mine/infer", "json": body}
        response, metrics = call(app, sent, {"method": "GET", "url": "/metrics"})
        assert response.status_code == 200
        lines = (line.split() for line in metrics.text.splitlines())
        return {name: value for name, value, *_ in lines if name.startswith("early_exit_drift")}

    def test_they_show_the_last_images(self, app):
        assert self.send(app, 900, 99) == {}
        found = self.send(app, 0, 1)
        assert found["early_exit_drift"] == "0.4"
        expected = distance_by_chance(2, 1000, 1000)
        assert float(found["early_exit_drift_by_chance"]) == pytest.approx(expected)
        assert self.send(app, 0, 400)["early_exit_drift"] == "0.0"

    def test_a_policy_of_unknown_shares_has_none(self, app, engine):
        engine.policy = engine.policy.with_threshold(0.8)
        assert self.send(app, 500, 500) == {}

    def test_images_of_an_earlier_policy_are_not_counted(self, engine, make_service):
        service = make_service()
        earlier, engine.policy = engine.policy, engine.policy.with_threshold(0.8)
        service.metrics.count_exits(earlier, np.zeros(1000, np.int64))
        assert service.metrics.window.counts(earlier) is None
