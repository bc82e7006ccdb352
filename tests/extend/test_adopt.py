"""A user's own training loop: a network trained elsewhere becomes a finished run."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import (
    TASK,
    assert_close,
    assert_names,
    few_digits,
    live_of,
    quick_report,
    refusal,
    tiny_network,
)

from early_exit.choosing.goals import Budget
from early_exit.choosing.outcome import disagreements
from early_exit.choosing.record import ExitRecord
from early_exit.classifier import load
from early_exit.config import Config, ModelConfig, OptimConfig, RunConfig
from early_exit.data.in_memory import ImageSet
from early_exit.evaluation.evaluate import evaluate
from early_exit.model.cost import network_cost
from early_exit.model.losses import joint_loss
from early_exit.model.network import MultiExitNetwork
from early_exit.training import checkpoint
from early_exit.training.train import adopt, default_run_dir, train


class TestAdopt:
    CONFIG = Config(
        model=ModelConfig(exits=("layer1", "layer2")),
        optim=OptimConfig(batch_size=8),
        run=RunConfig(device="cpu", threads=1),
    )

    @pytest.fixture
    def network(self) -> MultiExitNetwork:
        """A network that a user's loop has trained for a few steps with Adam."""
        torch.manual_seed(3)
        data, network = few_digits(0), tiny_network(self.CONFIG, 10).train()
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for images, targets in data.train_batches(8, seed=0, epoch=0):
            optimizer.zero_grad()
            joint_loss(network(images), targets, (1.0, 1.0, 1.0)).backward()
            optimizer.step()
        return network.eval()

    def test_what_was_trained_elsewhere_is_evaluated_and_used(self, network, tmp_path):
        data = few_digits(0)
        run = adopt(network, TASK, self.CONFIG, data, str(tmp_path / "run"))
        report = quick_report(run, name="mine", live=True, batch_sizes=(1,), timing_images=4)
        assert report["run"]["weights"].endswith("of the last epoch")
        assert report["live"]["differing_beyond_rounding"] == 0
        record = ExitRecord.load(run / "records" / "test-off")
        images = torch.cat([images for images, _ in data.eval_batches("test", 500)])
        with torch.no_grad():
            logits = torch.stack(network(images), dim=1)
        # eight layers, of at most 64 channels and 3x3 kernels
        assert_close(torch.from_numpy(record.logits), logits, terms=8 * 64 * 9)
        classify = load(run, "mine", task=TASK, device="cpu")
        answers = classify.answer(data.splits["test"].images)
        found = disagreements(record, classify.policy, live_of([answers]))
        assert found.rounding < 1e-3 and not found.unexplained.any()

    def test_it_is_a_finished_run(self, network, tmp_path, caplog):
        run = adopt(network, TASK, self.CONFIG, few_digits(0), tmp_path / "run")
        before = (run / checkpoint.NAME).read_bytes()
        with caplog.at_level("INFO"):
            train(self.CONFIG, TASK, runs=tmp_path, run_dir=run, resume="auto")
        assert [message for message in caplog.messages if str(run) in message]
        assert (run / checkpoint.NAME).read_bytes() == before

    def test_seen_val_is_not_fitted_on(self, network, tmp_path):
        data = few_digits(0)
        run = adopt(network, TASK, self.CONFIG, data, tmp_path / "run", val_unseen=False)
        assert "--val-from test" in refusal(quick_report, run)
        assert quick_report(run, val_from="test")["choice"]["val_images"] == 30

    def test_another_network_than_the_tasks(self, network, tmp_path):
        other = Config(model=ModelConfig(exits=("layer1",)))
        message = refusal(adopt, network, TASK, other, few_digits(0), tmp_path / "run")
        assert "heads.layer2" in message
        assert not (tmp_path / "run").exists()

    def test_images_of_another_size_than_the_networks(self, network, tmp_path):
        """Costs would be counted, and photos resized, for the network's example."""
        data = few_digits(0)
        splits = {
            name: ImageSet(part.images[..., 1:, 1:], part.targets)
            for name, part in data.splits.items()
        }
        other = dataclasses.replace(data, splits=splits)
        message = refusal(adopt, network, TASK, self.CONFIG, other, tmp_path / "run")
        assert_names(message, (3, 15, 15), (3, 16, 16), "example")

    def test_an_existing_directory_is_refused(self, network, evaluated_run):
        message = refusal(adopt, network, TASK, self.CONFIG, few_digits(0), evaluated_run)
        assert str(evaluated_run) in message

    def test_the_callers_random_state_does_not_change(self, network, tmp_path):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        adopt(network, TASK, self.CONFIG, few_digits(0), tmp_path / "run")
        assert torch.equal(torch.rand(3), expected)


def test_an_evaluation_is_in_float32_whatever_training_did(run_copy):
    state = checkpoint.load(run_copy)
    state["config"]["run"]["amp"] = "bf16"
    checkpoint.save(run_copy, state)
    report, _ = evaluate(run_copy, TASK, Budget(0.8), live=False, draw=False)
    assert report.environment.precision == "float32"


def test_a_record_knows_its_cost(evaluated_run):
    record = ExitRecord.load(evaluated_run / "records" / "test-off")
    network = tiny_network(TestAdopt.CONFIG, 10)
    cost = network_cost(network)
    assert record.cost.cumulative() == cost.cumulative()
    assert record.cost.shares((True, False)) == cost.shares((True, False))


def test_a_run_directory_has_a_name_without_a_data_set():
    path = default_run_dir(Path("runs"), Config(), ("layer1", "final"))
    assert path == Path("runs/data-resnet32-layer1-joint-seed0")
