"""Temperature scaling."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from early_exit import metrics
from early_exit.choosing import calibration
from early_exit.choosing.calibration import LIMITS, fit_temperature
from early_exit.inference.criteria import max_prob

# Four images of odds 3 : 1 of which one is the second class, ten of odds 9 : 1 of which one is:
# at temperature 1 the probabilities are exactly right.
TRUE_LOGITS = torch.tensor([[math.log(3), 0.0]] * 4 + [[math.log(9), 0.0]] * 10)
TARGET = torch.tensor([0, 0, 0, 1] + [0] * 9 + [1])


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 1.5, 3.0, 10.0])
def test_a_planted_temperature_is_recovered(temperature):
    fitted = fit_temperature(TRUE_LOGITS * temperature, TARGET)
    assert fitted == pytest.approx(temperature, rel=1e-3)


@given(st.floats(math.log(0.06), math.log(16)))
def test_any_planted_temperature_is_recovered(log_temperature):
    temperature = math.exp(log_temperature)
    fitted = fit_temperature(TRUE_LOGITS * temperature, TARGET)
    assert fitted == pytest.approx(temperature, rel=1e-2)


@given(st.floats(math.log(0.2), math.log(16)), st.integers(0, 1000))
def test_no_other_temperature_has_a_lower_cross_entropy(log_scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * math.exp(log_scale) * torch.randn(200, 10, generator=generator).double()
    # half the targets are the best logits, the others random
    random = torch.randint(10, (200,), generator=generator)
    target = torch.where(torch.arange(200) < 100, logits.argmax(dim=-1), random)
    fitted = fit_temperature(logits.float(), target)

    def loss(temperature):
        return torch.nn.functional.cross_entropy(logits / temperature, target).item()

    grid = torch.logspace(math.log10(LIMITS[0]), math.log10(LIMITS[1]), 60).tolist()
    assert loss(fitted) <= min(map(loss, grid)) + 1e-4


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0, 1000.0])
def test_a_val_set_without_an_error_stays_within_the_limits(scale):
    # the lower the temperature the lower the loss, without end
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0]]) * scale
    assert LIMITS[0] <= fit_temperature(logits, torch.tensor([0, 1])) <= LIMITS[1]


def of_margins(margin: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of images whose target is ahead by these margins, and the targets."""
    logits = torch.zeros(len(margin), classes)
    logits[:, 0] = margin
    return logits, torch.zeros(len(margin), dtype=torch.long)


@pytest.mark.parametrize("images", [36, 1000])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_without_an_error_the_order_of_the_images_is_kept(images, classes, scale):
    # far enough from each other that no rounding of a processor changes their order
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    margin = torch.linspace(1, 3, images)[order]
    logits, target = of_margins(margin * scale, classes)
    _, score, _ = max_prob(logits / fit_temperature(logits, target))
    assert (score[margin.argsort()].diff() >= 0).all()
    assert len(score.unique()) > 0.95 * len(margin.unique())


@pytest.mark.parametrize("images", [36, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_a_small_error_does_not_merge_the_surest_images(images, scale):
    margin = 1 + 2 * torch.rand(images, generator=torch.Generator().manual_seed(0))
    logits, target = of_margins(margin * scale, 10)
    logits[0, 1] = 1.001 * logits[0, 0]
    _, score, _ = max_prob(logits / fit_temperature(logits, target))
    assert (score < 1).all()


def test_a_temperature_above_one_is_that_of_the_lowest_cross_entropy():
    logits = torch.cat([TRUE_LOGITS * 1.5, torch.tensor([[80.0, 0.0]])])  # far beyond resolution
    fitted = fit_temperature(logits, torch.cat([TARGET, torch.tensor([0])]))
    assert fitted == pytest.approx(1.5, rel=1e-3)


def test_small_logits_without_an_error_end_at_the_lower_limit():
    logits = torch.tensor([[0.2, 0.0], [0.0, 0.3]])  # at 0.05 still only 98 % sure
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(LIMITS[0])


def test_uninformative_logits_end_at_the_upper_limit():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(LIMITS[1])


def test_logits_that_are_always_wrong_end_at_the_upper_limit():
    logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(LIMITS[1])


def test_no_answer_changes():
    logits = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    target = torch.randint(10, (100,), generator=torch.Generator().manual_seed(1))
    temperature = fit_temperature(logits, target)
    assert torch.equal((logits / temperature).argmax(dim=-1), logits.argmax(dim=-1))


def test_the_logits_do_not_change():
    logits = (TRUE_LOGITS * 2).requires_grad_()
    before = logits.detach().clone()
    fit_temperature(logits.detach(), TARGET)
    assert torch.equal(logits, before)
    assert logits.grad is None


@given(st.floats(math.log(0.06), math.log(16)))
def test_the_root_is_found_in_few_passes(log_temperature):
    # each pass reads every logit: with a thousand classes, hundreds of megabytes
    with pytest.MonkeyPatch.context() as patch:
        passes, derivative = [], calibration._derivative
        patch.setattr(
            calibration,
            "_derivative",
            lambda *given: passes.append(given[-1]) or derivative(*given),
        )
        fit_temperature(TRUE_LOGITS * math.exp(log_temperature), TARGET)
    assert len(passes) <= 25


def test_chunks_of_rows_change_nothing(monkeypatch):
    torch.manual_seed(0)
    logits, target = 5 * torch.randn(101, 7), torch.randint(7, (101,))
    whole = fit_temperature(logits, target)
    monkeypatch.setattr(metrics, "CHUNK", 70)
    assert fit_temperature(logits, target) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, -70.1])
def test_logits_that_are_all_equal_have_temperature_one(value):
    assert fit_temperature(torch.full((30, 10), value), torch.arange(30) % 10) == 1.0
