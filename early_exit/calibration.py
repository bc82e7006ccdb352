"""Temperature scaling (Guo et al., arXiv:1706.04599): one number per exit, fitted on val."""

import torch
from torch import Tensor
from torch.nn import functional as F

LIMITS = (0.05, 20.0)  # a val set without an error would drive the temperature to 0


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T that minimises the cross-entropy of logits / T.

    logits: (B, K) of one exit on val; target: (B,). Found by LBFGS on ln T, in float64, and kept
    within `LIMITS`. The answer of an exit does not depend on it, how sure it looks does.
    """
    logits = logits.double()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    low, high = torch.tensor(LIMITS, dtype=torch.float64).log()
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.clamp(low, high).exp(), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_temperature.detach().clamp(low, high).exp())
