"""The optimiser: groups of parameters, each with its rate, and the schedule of the rate."""

import math
from typing import Any

import torch
from torch import nn

from early_exit.config import OptimConfig
from early_exit.model.network import MultiExitNetwork


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The parameters of `module` that require a gradient, grouped by rate and weight decay.

    `lr_scale` is the factor on the schedule's rate. That of BatchNorm's biases leaves their decay
    per step, rate times `weight_decay`, as it is (arXiv:2404.00498).
    """
    heads = set(module.heads.parameters()) if isinstance(module, MultiExitNetwork) else set()
    norm_biases = {
        part.bias
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.bias is not None
    }
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            spared = not optim.decay_norm and parameter.ndim <= 1
            head = optim.head_lr_scale if parameter in heads else 1.0
            bias = optim.bias_lr_scale if parameter in norm_biases else 1.0
            groups.setdefault((spared, head, bias), []).append(parameter)
    return [
        {
            "params": groups[spared, head, bias],
            "lr": optim.lr * head * bias,
            "lr_scale": head * bias,
            "weight_decay": 0.0 if spared else optim.weight_decay / bias,
        }
        for spared, head, bias in sorted(groups)
    ]


def make_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """SGD over the parameters of `module` that require a gradient."""
    groups = parameter_groups(module, optim)
    optimizer = torch.optim.SGD(
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    if optim.momentum:
        # The fused kernel allocates the buffers in the first step, and leaves them uninitialised if
        # a GradScaler skips that step.
        for parameter in (parameter for group in groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_at(optim: OptimConfig, epoch: float) -> float:
    """The learning rate at `epoch` of a phase, fractions included.

    It depends on the position alone, so a checkpoint stores no schedule.
    """
    if optim.schedule == "triangular":
        progress = epoch / optim.epochs
        if progress < optim.peak:
            return optim.lr * (
                optim.start_factor + (1 - optim.start_factor) * progress / optim.peak
            )
        fallen = (progress - optim.peak) / (1 - optim.peak)
        return optim.lr * (1 - (1 - optim.end_factor) * fallen)
    warmup = min(optim.warmup_epochs, optim.epochs / 10)
    if epoch < warmup:
        # from a tenth of the rate, linearly up
        return optim.lr * (0.1 + 0.9 * epoch / warmup)
    if optim.schedule == "cosine":
        progress = (epoch - warmup) / (optim.epochs - warmup)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * 0.1 ** sum(epoch >= mark * optim.epochs for mark in optim.milestones)
