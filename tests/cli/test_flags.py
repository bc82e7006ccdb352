"""Parsers: errors of one line, hints at the right flag, and how settings are collected."""

import argparse
import math
import os

import pytest
from helpers import assert_names, refusal

from cifar10 import eval as evaluation
from cifar10 import trainer
from early_exit.cli import flags
from imagenet import main


@pytest.fixture
def parser() -> flags.Parser:
    """A parser of two settings, one of them without a value, and of a flag that is none."""
    parser = flags.build_parser("x.py", "python x.py [flags]", "A script.")
    flags.add_setting(parser, "--rate", "-r", setting="optim.lr", type=float)
    flags.add_setting(parser, "--quick", setting="run.quick", const=True)
    parser.add_argument("--other", dest="not.one", default=3)
    return parser


class TestSettings:
    def test_they_are_collected_by_name(self, parser):
        assert parser.parse_args([]).settings == {}
        found = parser.parse_args(["-r", "0.5", "--quick"])
        assert found.settings == {"optim.lr": 0.5, "run.quick": True}
        assert not hasattr(found, "optim.lr")

    def test_a_dot_in_the_name_of_another_flag_makes_it_no_setting(self, parser):
        found = parser.parse_args(["--other", "4"])
        assert found.settings == {} and vars(found)["not.one"] == "4"

    def test_two_parses_share_nothing(self, parser):
        parser.parse_args(["--quick"])
        assert parser.parse_args([]).settings == {}

    def test_a_positional_argument_may_be_a_setting(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main.parser().parse_args([]).settings == {}
        assert main.parser().parse_args(["here"]).settings == {"data.root": f"{tmp_path}/here"}


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "named"),
        [
            ([""], "first word"),
            (["--rate", ""], "--rate"),
            (["--rate="], "--rate"),
            (["--quick", "--other", ""], "--other"),
        ],
    )
    def test_an_empty_word(self, parser, words, named):
        assert_names(refusal(parser.parse_args, words), named, "empty", "--help")

    @pytest.mark.parametrize("words", [["--note", ""], ["--note="]])
    def test_a_flag_whose_default_is_empty_takes_an_empty_word(self, parser, words):
        parser.add_argument("--note", default="")
        assert parser.parse_args(words).note == ""

    def test_a_value_may_end_like_a_flag_without_one(self, parser):
        found = parser.parse_args(["--other", "a=", "--rate=1"])
        assert vars(found)["not.one"] == "a="

    def test_they_are_one_line(self, parser):
        assert_names(refusal(parser.parse_args, ["--rates", "3"]), "--rates", "--help")

    @pytest.mark.parametrize("words", [["--half", "1"], ["--half=1"], ["--half"]])
    def test_a_flag_of_another_script_is_answered_with_ours(self, parser, words):
        parser.instead = {"--half": "--amp fp16", "--full": "--amp off"}
        err = refusal(parser.parse_args, words)
        assert_names(err, "--half", "--amp fp16")
        assert "--amp off" not in err

    @pytest.mark.parametrize("words", [["-j", "4"], ["-j4"]])
    def test_a_short_one_with_its_value_too(self, parser, words):
        parser.instead = {"-j": "--threads N"}
        assert_names(refusal(parser.parse_args, words), "-j", "--threads")

    @pytest.mark.parametrize("script", [trainer, main])
    def test_what_is_recommended_instead_is_a_flag_of_the_script(self, script):
        parser = script.parser()
        known = {name for action in parser._actions for name in action.option_strings}
        for flag, ours in parser.instead.items():
            assert flag not in known
            assert ours.split()[0] in {*known, "torchrun"}


class TestNumbers:
    ARGS = argparse.Namespace(none=None, one=1, half=0.5, no_number=math.nan, several=[3, 1, 2])

    @pytest.mark.parametrize(
        "least, name, named",
        [
            (2, "one", ("--one", 2, 1)),
            (1, "half", ("--half", 1, 0.5)),
            (0, "no_number", ("--no-number", 0, "nan")),
            (2, "several", ("--several", 2, 1)),
        ],
    )
    def test_one_below_the_least_is_refused(self, least, name, named):
        assert_names(refusal(flags.check_at_least, self.ARGS, least, "none", name), *named)

    def test_the_least_passes(self):
        flags.check_at_least(self.ARGS, 1, "none", "one", "several")
        flags.check_at_least(self.ARGS, 0.5, "half")


def test_an_absolute_path_does_not_depend_on_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert flags.absolute("a/b") == os.path.join(tmp_path, "a", "b")
    assert flags.absolute("/a") == "/a"


def test_a_trainers_and_an_evaluations_machine_flags_set_the_same():
    words = ["--device", "cpu", "--threads", "2", "--amp", "bf16", "--compile"]
    words += ["--no-channels-last"]
    expected = {
        "run.device": "cpu",
        "run.threads": "2",
        "run.amp": "bf16",
        "run.compile": True,
        "run.channels_last": False,
    }
    for parser, run in ((trainer.parser(), []), (evaluation.parser(), ["RUN"])):
        assert parser.parse_args([*run, *words]).settings == expected
