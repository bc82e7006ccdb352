"""A user's own kind of head, by name."""

from helpers import TASK, quick_report, refusal, tiny_run
from torch import nn

from early_exit.classifier import load
from early_exit.config import ModelConfig
from early_exit.model import heads


class Means(nn.Sequential):
    """A linear layer on every channel's mean."""

    def __init__(self, channels: int, num_classes: int) -> None:
        pooling = nn.AdaptiveAvgPool2d(1)
        super().__init__(pooling, nn.Flatten(), nn.Linear(channels, num_classes))


def test_a_kind_of_head_by_name_from_training_to_classifying(monkeypatch, tmp_path):
    message = refusal(ModelConfig, head="means")
    assert "means" in message and "conv" in message
    monkeypatch.setitem(heads.HEADS, "means", Means)
    run = tiny_run(tmp_path / "run", TASK, head="means")
    quick_report(run, name="mine")
    assert type(load(run, "mine", task=TASK, device="cpu").loaded.network.stages[0].head) is (Means)
