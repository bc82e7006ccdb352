"""How gradients of heads and of the rest of the network reach the features before both."""

import pytest
import torch
from torch import nn

from early_exit.model.gradients import GradientFlow, scale_gradient
from early_exit.model.network import MultiExitNetwork

FLOWS = [
    GradientFlow(equilibrium=True),
    GradientFlow(detach_heads=1.0),
    GradientFlow(detach_heads=0.5, detach_rest=0.5),
]


class Chain(nn.Module):
    """Multiplies two numbers three times by a weight of 1; the logits are the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ModuleList(Factor() for _ in range(3))

    def forward(self, images):
        for factor in self.factors:
            images = factor(images)
        return images.flatten(1)

    def units(self):
        units = {f"factor{number}": factor for number, factor in enumerate(self.factors)}
        return {**units, "classifier": nn.Flatten()}


class Factor(nn.Module):
    """Multiplies each channel by a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, images):
        return images * self.weight


def gradients(flow: GradientFlow | None) -> list[list[float]]:
    """The gradient of each factor's weights, for the sum of all logits of three exits."""
    chain = Chain()
    network = MultiExitNetwork(
        chain,
        chain.units(),
        ("factor0", "factor1"),
        num_classes=2,
        example=torch.zeros(1, 2, 1, 1),
        head=lambda shape, num_classes: nn.Flatten(),
    )
    network.gradient_flow = flow
    sum(logits.sum() for logits in network(torch.ones(1, 2, 1, 1))).backward()
    return [factor.weight.grad.flatten().tolist() for factor in chain.factors]


def test_without_a_flow_all_exits_add_up():
    assert gradients(None) == [[3, 3], [2, 2], [1, 1]]


def test_equilibrium_weighs_the_exits_still_to_come():
    # Li et al.: at the second exit half of the head's 1 and half of the rest's 1; at the first a
    # third of the head's 1 and two thirds of the 1 behind it
    first, second, third = gradients(GradientFlow(equilibrium=True))
    assert first == pytest.approx([1, 1])
    assert second == pytest.approx([1, 1])
    assert third == [1, 1]


def test_detached_heads_leave_the_final_exit_alone():
    assert gradients(GradientFlow(detach_heads=1.0)) == [[1, 1], [1, 1], [1, 1]]


def test_divided_channels_serve_either_the_head_or_the_rest():
    # the first channel is the heads', the second the rest's
    flow = GradientFlow(detach_heads=0.5, detach_rest=0.5)
    assert gradients(flow) == [[1, 1], [1, 1], [1, 1]]
    assert gradients(GradientFlow(detach_rest=0.5)) == [[1, 3], [1, 2], [1, 1]]


@pytest.mark.parametrize("flow", FLOWS)
def test_values_do_not_change(flow):
    features = (torch.randn(2, 4, 3, 3), torch.randn(2, 6, 2, 2))
    for read in flow.split(features, 3):
        assert all(torch.equal(new, old) for new, old in zip(read, features, strict=True))


def test_the_channels_of_tokens_are_the_last_dimension():
    tokens = torch.ones(1, 5, 4, requires_grad=True)
    _, rest = GradientFlow(detach_rest=0.5).split(tokens, 2)
    rest.sum().backward()
    assert tokens.grad[0].tolist() == 5 * [[0, 0, 1, 1]]


def test_a_scaled_gradient_of_a_tensor():
    features = torch.tensor([2.0], requires_grad=True)
    (3 * scale_gradient(features, 0.25)).backward()
    assert features.grad.item() == 0.75
