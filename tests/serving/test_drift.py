"""Whether traffic looks like val: the distance, what it is by chance, and the gauges."""

import dataclasses
import math

import numpy as np
import pytest
from fakes import SHAPE, call, colour_model

from early_exit.inference.policy import Policy
from early_exit.serving.drift import Window, distance, distance_by_chance

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
    @pytest.mark.parametrize(("val_images", "rows"), [(5000, 1000), (180, 1000)])
    def test_with_two_exits_it_is_the_quantile_of_a_difference_of_shares(self, val_images, rows):
        """Which is normal, with the sum of their variances; 0.05 % are beyond 3.2905 on each side.
        Of 20,000 draws 20 are beyond: the quantile is off by less than 10 %."""
        sigma = math.sqrt(0.25 / val_images + 0.25 / rows)
        found = distance_by_chance((0.5, 0.5), val_images, rows)
        assert found == pytest.approx(3.2905 * sigma, rel=0.1)

    @pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.4, 0.3, 0.3)])
    def test_what_is_like_val_is_seldom_beyond_and_what_is_not_always(self, shares):
        rng, rows, val_images = np.random.default_rng(1), 1000, 5000
        most = distance_by_chance(shares, val_images, rows)
        val = rng.multinomial(val_images, shares, 2000) / val_images
        live = rng.multinomial(rows, shares, 2000)
        # 2 are expected; more than 11 have a probability of about 1e-6
        assert sum(found > most for found in map(distance, live, val)) <= 11
        moved = np.array([shares[0] - 0.2, shares[1] + 0.2, *shares[2:]])
        assert min(map(distance, rng.multinomial(rows, moved, 2000), val)) > most

    def test_an_exit_that_no_image_of_val_took(self):
        """One image of the window that takes it is not beyond chance."""
        assert distance_by_chance((1.0, 0.0), 1000, 1000) > distance([999, 1], [1.0, 0.0])


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
        expected = distance_by_chance((0.5, 0.5), 1000, 1000)
        assert float(found["early_exit_drift_by_chance"]) == pytest.approx(expected)
        assert self.send(app, 0, 400)["early_exit_drift"] == "0.0"

    def test_a_policy_of_unknown_shares_has_none(self, app, engine):
        engine.policy = engine.policy.with_threshold(0.8)
        assert self.send(app, 500, 500) == {}

    def test_images_of_an_earlier_policy_are_not_counted(self, engine, make_service):
        service = make_service()
        earlier, engine.policy = engine.policy, engine.policy.with_threshold(0.8)
        service.metrics.count_exits(earlier, [0] * 1000)
        assert service.metrics.window.counts(earlier) is None
