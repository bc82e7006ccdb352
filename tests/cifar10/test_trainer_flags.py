"""The CIFAR trainer's flags: their help, and what they change."""

import dataclasses
import logging
import re

import pytest
import torch
from helpers import (
    DTYPES,
    TASK,
    TINY,
    assert_names,
    read_journal,
    require_precision,
    tiny_network,
    train_tiny,
)

from cifar10 import trainer
from early_exit.config import (
    Config,
)
from early_exit.errors import UserError
from early_exit.task import Task
from early_exit.training import checkpoint


class TestHelp:
    @pytest.fixture(scope="class")
    @classmethod
    def text(cls) -> str:
        return trainer.parser().format_help()

    def test_it_is_printed_with_code_0(self, run, text):
        assert run("--help") == (0, text, "")

    @pytest.mark.parametrize(
        ("flag", "setting"),
        [
            ("--arch", "model.arch"),
            ("--head", "model.head"),
            ("--regime", "run.regime"),
            ("--epochs", "optim.epochs"),
            ("--batch-size", "optim.batch_size"),
            ("--learning-rate", "optim.lr"),
            ("--schedule", "optim.schedule"),
            ("--momentum", "optim.momentum"),
            ("--weight-decay", "optim.weight_decay"),
            ("--distill", "loss.distill"),
            ("--save-every", "run.save_every"),
            ("--amp", "run.amp"),
            ("--seed", "run.seed"),
            ("--split-seed", "data.split_seed"),
        ],
    )
    def test_it_names_the_default(self, flag, setting):
        section, name = setting.split(".")
        (action,) = (a for a in trainer.parser()._actions if flag in a.option_strings)
        default = getattr(getattr(Config(), section), name)
        assert action.dest == setting
        default = " ".join(default) if isinstance(default, tuple) else default
        assert_names(action.help, f"{default:g}" if isinstance(default, float) else default)

    def test_every_flag_with_a_value_describes_its_default(self):
        silent = {"--config", "--set", "--resume", "--backbone"}  # absent: there is none
        for action in trainer.parser()._actions:
            shown = action.help != "==SUPPRESS==" and action.nargs != 0
            if shown and not silent & {*action.option_strings}:
                described = re.search(
                    "default|absent|without|unless|otherwise|not given", action.help
                )
                assert described, action.option_strings

    def test_without_a_data_set_it_is_cifar10(self, error, monkeypatch):
        def load_data(settings):
            raise UserError(f"asked for {settings.dataset}")

        monkeypatch.setattr(trainer, "TASK", Task(tiny_network, load_data))
        assert error("--epochs", "1") == "asked for cifar10"

    def test_it_shows_the_examples_of_the_script(self, text):
        assert "python cifar10/trainer.py --dataset digits" in text


class TestFlags:
    """Flags that change how a run is computed: each trains, and none is ignored."""

    @pytest.fixture
    def weights(self, tmp_path):
        """A function that gives the backbone's weights after a run of two epochs with flags."""

        def call(*flags, task=TASK) -> dict[str, torch.Tensor]:
            return checkpoint.load(train_tiny(tmp_path / "run", *flags, task=task))["network"]

        return call

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_amp(self, monkeypatch, weights, joint, amp):
        require_precision(amp)
        seen = set()

        def spying(settings, num_classes):
            network = tiny_network(settings, num_classes)
            network.backbone.layer2[0].conv1.register_forward_hook(
                lambda _, inputs, output: seen.add(output.dtype)
            )
            return network

        found = weights("--amp", amp, task=dataclasses.replace(TASK, build_network=spying))
        reference = checkpoint.load(joint)["network"]
        name = "backbone.conv1.weight"
        assert DTYPES[amp] in seen
        assert not torch.equal(found[name], reference[name])
        assert all(value.isfinite().all() for value in found.values())
        assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}

    def test_distill_teaches_the_early_exits(self, weights, joint):
        name, reference = "heads.layer1.5.weight", checkpoint.load(joint)["network"]
        assert not torch.equal(weights("--distill", "0.5")[name], reference[name])

    @pytest.mark.parametrize(
        "flags, layout",
        [
            ((), torch.channels_last),
            (("--no-channels-last",), torch.contiguous_format),
        ],
    )
    def test_channels_last(self, monkeypatch, tmp_path, flags, layout):
        seen = []

        def spying(settings):
            network = tiny_network(settings, 10)
            network.backbone.layer2[0].register_forward_pre_hook(
                lambda _, inputs: seen.append(
                    (len(inputs[0]), inputs[0].is_contiguous(memory_format=layout))
                )
            )
            return network

        monkeypatch.setattr(
            trainer, "TASK", Task(lambda settings, _: spying(settings), TASK.load_data)
        )
        trainer.main([*TINY, "--epochs", "1", "--save-dir", str(tmp_path / "run"), *flags])
        # six steps and a batch of val; the checks of a new network see fewer images, of no layout
        assert [found for rows, found in seen if rows >= 8] == [True] * 7

    def first_loss(self, directory, *flags) -> float:
        """The loss of the first step, which takes all images: of the weights of the seed."""
        flags = ("--epochs", "1", "-b", "48", *flags)
        return read_journal(train_tiny(directory, *flags))[0]["train_loss"]

    @pytest.mark.parametrize("amp", ["bf16", "fp16"])
    def test_amp_gives_the_same_loss_but_for_rounding(self, tmp_path, amp):
        require_precision(amp)
        expected = self.first_loss(tmp_path / "off")
        # each of eight layers rounds its input, its weights and its output once
        bound = 24 * torch.finfo(DTYPES[amp]).eps * expected
        assert self.first_loss(tmp_path / amp, "--amp", amp) == pytest.approx(expected, abs=bound)

    @pytest.mark.slow
    def test_compile(self, monkeypatch, tmp_path):
        expected = self.first_loss(tmp_path / "off")
        compiled, compile_ = [], torch.nn.Module.compile
        monkeypatch.setattr(
            torch.nn.Module,
            "compile",
            lambda module, **options: compiled.append(1) or compile_(module, **options),
        )
        found = self.first_loss(tmp_path / "on", "--compile")
        assert compiled
        # sums of up to 3 x 3 x 64 products in each of eight layers, in any order
        bound = 8 * 576 * torch.finfo(torch.float32).eps * expected
        assert found == pytest.approx(expected, abs=bound)


class TestProgress:
    def lines(self, caplog, directory, *flags) -> list[str]:
        """What a tiny run logs about its steps."""
        with caplog.at_level(logging.INFO):
            train_tiny(directory, "--epochs", "1", *flags)
        return [
            message
            for record, message in zip(caplog.records, caplog.messages, strict=True)
            if record.module == "epochs"
        ]

    def test_print_freq_logs_lines_when_there_is_no_terminal(self, caplog, tmp_path):
        lines = self.lines(caplog, tmp_path / "run", "-p", "2")
        assert len(lines) == 3
        for line, step in zip(lines, (2, 4, 6), strict=True):
            assert_names(line, step, 6, "layer2", "final")

    def test_without_it_an_epoch_is_one_line(self, caplog, tmp_path):
        assert self.lines(caplog, tmp_path / "run") == []
        assert [record.module for record in caplog.records].count("journal") == 1
