"""Early-exit inference for image classifiers.

`import early_exit` gives the names below and imports torch only when one that needs it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from early_exit.choosing.choice import choose as choose
    from early_exit.choosing.goals import Budget as Budget
    from early_exit.choosing.goals import ConditionalDeepLearning as ConditionalDeepLearning
    from early_exit.choosing.goals import FixedPolicy as FixedPolicy
    from early_exit.choosing.goals import FixedThresholds as FixedThresholds
    from early_exit.choosing.goals import Goal as Goal
    from early_exit.choosing.goals import LatencyBudget as LatencyBudget
    from early_exit.choosing.goals import MaxDrop as MaxDrop
    from early_exit.choosing.goals import Risk as Risk
    from early_exit.config import Config as Config
    from early_exit.evaluation.evaluate import evaluate as evaluate
    from early_exit.inference.infer import infer as infer
    from early_exit.inference.policy import Policy as Policy
    from early_exit.inference.stream import infer_stream as infer_stream
    from early_exit.loading import load as load
    from early_exit.model.cost import network_cost as network_cost
    from early_exit.model.network import MultiExitNetwork as MultiExitNetwork
    from early_exit.task import Task as Task
    from early_exit.training.train import adopt as adopt
    from early_exit.training.train import train as train

__version__ = "0.2.0"

_MODULES = {
    "Budget": "choosing.goals",
    "ConditionalDeepLearning": "choosing.goals",
    "Config": "config",
    "FixedPolicy": "choosing.goals",
    "FixedThresholds": "choosing.goals",
    "Goal": "choosing.goals",
    "LatencyBudget": "choosing.goals",
    "MaxDrop": "choosing.goals",
    "MultiExitNetwork": "model.network",
    "Policy": "inference.policy",
    "Risk": "choosing.goals",
    "Task": "task",
    "adopt": "training.train",
    "choose": "choosing.choice",
    "evaluate": "evaluation.evaluate",
    "infer": "inference.infer",
    "infer_stream": "inference.stream",
    "load": "loading",
    "network_cost": "model.cost",
    "train": "training.train",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'early_exit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"early_exit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
