"""From flags to settings, a configuration, a goal and the options of an evaluation."""

import pytest
from helpers import assert_names, refusal

from cifar10 import eval as evaluation
from cifar10 import trainer
from early_exit.choosing.goals import (
    Budget,
    ConditionalDeepLearning,
    FixedPolicy,
    FixedThresholds,
    LatencyBudget,
    MaxDrop,
    Risk,
)
from early_exit.cli import settings
from early_exit.config import Config, OptimConfig
from early_exit.inference.policy import Policy
from imagenet import main as imagenet_main


def from_flags(*flags: object, saved: dict | None = None, own: dict | None = None) -> Config:
    """The configuration that the trainer's flags give."""
    args = trainer.parser().parse_args([str(flag) for flag in flags])
    return settings.resolve_config(args, saved, own)


class TestSettingsOf:
    """Flags of settings are collected by their action, whatever the name of their value."""

    def given(self, *flags: str) -> dict:
        return settings.settings_of(trainer.parser().parse_args(flags))

    def test_without_flags_there_are_none(self):
        assert self.given() == {}

    def test_sections_are_nested(self):
        found = self.given("--lr", "0.3", "-b", "32", "--seed", "4")
        assert found == {"optim": {"lr": "0.3", "batch_size": "32"}, "run": {"seed": "4"}}

    def test_the_last_of_one_flag_wins(self):
        assert self.given("--lr", "0.3", "--lr", "0.4") == {"optim": {"lr": "0.4"}}
        assert self.given("--set", "optim.lr=3", "--set", "optim.lr=4") == {"optim": {"lr": "4"}}

    def test_a_setting_is_given_by_one_flag(self):
        args = trainer.parser().parse_args(["--set", "optim.lr=0.5", "--lr", "0.4"])
        assert_names(refusal(settings.settings_of, args), "--set optim.lr=0.5", "remove")
        message = refusal(imagenet_main.parser().parse_args, ["--device", "cpu", "--gpu", "0"])
        assert_names(message, "--device", "--gpu", "remove")

    def test_a_flag_that_is_no_setting_is_not_among_them(self):
        assert self.given("--check", "--start-epoch", "3", "--resume", "a.b") == {}

    @pytest.mark.parametrize("flag", ["--exits", "--head"])
    def test_a_directory_is_not_a_place(self, flag, tmp_path, monkeypatch):
        (tmp_path / "set" / "train").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        for directory in ("set", "/data/imagenet"):
            args = trainer.parser().parse_args([flag, "layer1", directory])
            assert_names(refusal(settings.settings_of, args), flag, directory)


class TestPrecedence:
    def test_without_preset_and_flags_all_is_default(self):
        assert from_flags() == Config()

    def test_preset_wins_over_defaults(self, preset):
        config = from_flags("--config", preset("optim: {lr: 0.3}"))
        assert config.optim == OptimConfig(lr=0.3)

    def test_flags_win_over_the_preset(self, preset):
        path = preset("optim: {lr: 0.3, momentum: 0.5}")
        config = from_flags("--config", path, "--lr", "0.7")
        assert (config.optim.lr, config.optim.momentum) == (0.7, 0.5)

    def test_preset_wins_over_a_resumed_run(self, preset):
        saved = {"optim": {"lr": 0.2, "epochs": 7}}
        config = from_flags("--config", preset("optim: {lr: 0.3}"), saved=saved)
        assert (config.optim.lr, config.optim.epochs) == (0.3, 7)

    def test_a_resumed_run_wins_over_the_scripts_own_values(self):
        config = from_flags(saved={"optim": {"lr": 0.2}}, own={"optim": {"lr": 0.4, "epochs": 3}})
        assert (config.optim.lr, config.optim.epochs) == (0.2, 3)

    def test_exits_without_names_undo_the_presets(self, preset):
        config = from_flags("--config", preset("model: {exits: [layer2]}"), "--exits")
        assert config.model.exits is None

    def test_exits_none_is_the_plain_network(self, preset):
        config = from_flags("--config", preset("model: {exits: [layer2]}"), "--exits", "none")
        assert config.model.exits == ()

    def test_exits_replace_the_presets_and_are_not_added(self, preset):
        config = from_flags("--config", preset("model: {exits: [layer2]}"), "--exits", "layer1")
        assert config.model.exits == ("layer1",)

    def test_an_empty_preset_is_no_preset(self, preset):
        assert from_flags("--config", preset("# nothing yet\n")) == Config()

    def test_a_mistake_is_found_though_a_flag_would_hide_it(self, preset):
        path = preset("optim: {lr: -1}")
        assert_names(refusal(from_flags, "--config", path, "--lr", "0.1"), "optim.lr", "-1")


class TestSet:
    @pytest.mark.parametrize(
        ("pair", "section", "name", "value"),
        [
            ("optim.nesterov=true", "optim", "nesterov", True),
            ("optim.label_smoothing=1e-1", "optim", "label_smoothing", 0.1),
            ("optim.milestones=0.3,0.6", "optim", "milestones", (0.3, 0.6)),
            ("run.channels_last=off", "run", "channels_last", False),
            ("model.exits=layer1,layer2", "model", "exits", ("layer1", "layer2")),
            ("model.exits=none", "model", "exits", ()),
            ("model.exits=null", "model", "exits", None),
            ("data.root=/a=b", "data", "root", "/a=b"),
        ],
    )
    def test_sets_any_setting(self, pair, section, name, value):
        assert getattr(getattr(from_flags("--set", pair), section), name) == value

    def test_several_after_one_flag(self):
        config = from_flags("--set", "optim.nesterov=true", "optim.momentum=0.8")
        assert (config.optim.nesterov, config.optim.momentum) == (True, 0.8)

    def test_several_flags_add_up(self):
        config = from_flags("--set", "optim.nesterov=true", "--set", "optim.momentum=0.8")
        assert (config.optim.nesterov, config.optim.momentum) == (True, 0.8)

    def test_wins_over_the_preset(self, preset):
        path = preset("optim: {warmup_epochs: 3}")
        config = from_flags("--config", path, "--set", "optim.warmup_epochs=0")
        assert config.optim.warmup_epochs == 0.0

    def test_null_removes_what_the_preset_sets(self, preset):
        path = preset("loss: {start: 0.01, teacher: runs/teacher}")
        config = from_flags("--config", path, "--set", "loss.start=null", "loss.teacher=null")
        assert (config.loss.start, config.loss.teacher) == (None, None)

    def test_null_is_refused_where_a_value_is_needed(self):
        message = refusal(from_flags, "--set", "optim.lr=null")
        assert_names(message, "optim.lr", "a number", "None")

    @pytest.mark.parametrize("pair", ["optim.lr", "lr=0.1", "optim.lr:0.1"])
    def test_what_is_no_pair(self, pair):
        assert_names(refusal(from_flags, "--set", pair), "--set", "SECTION.NAME=VALUE", repr(pair))

    def test_an_empty_value(self):
        assert_names(refusal(from_flags, "--set", "loss.teacher="), "loss.teacher=", "null")

    def test_unknown_setting(self):
        message = refusal(from_flags, "--set", "optim.momentun=0.9")
        assert_names(message, "optim.momentun", "optim.momentum")

    def test_unknown_section(self):
        assert_names(refusal(from_flags, "--set", "optm.lr=0.9"), "optm", "optim")

    def test_wrong_kind(self):
        message = refusal(from_flags, "--set", "optim.nesterov=maybe")
        assert_names(message, "optim.nesterov", "maybe")


def parsed(*flags: object):
    """What cifar10/eval.py makes of its flags."""
    return evaluation.parser().parse_args(["RUN", *map(str, flags)])


class TestGoalOf:
    @pytest.mark.parametrize(
        ("flags", "goal"),
        [
            ((), MaxDrop(0.005)),
            (("--max-drop", 1), MaxDrop(0.01)),
            (("--max-drop", 0), MaxDrop(0.0)),
            (("--budget", 50), Budget(0.5)),
            (("--budget", 50, "--criterion", "margin"), Budget(0.5, criterion="margin")),
            (("--budget", 50, "--no-calibration"), Budget(0.5, calibrate=False)),
            (("--minimise", "macs"), MaxDrop(0.005)),
            (("--minimise", "seconds"), MaxDrop(0.005, "seconds")),
            (
                ("--max-drop", 1, "--minimise", "seconds", "--latency-batch", 64),
                MaxDrop(0.01, "seconds", 64),
            ),
            (("--latency-budget", "3ms"), LatencyBudget(0.003)),
            (
                ("--latency-budget", "60%", "--latency-batch", 8),
                LatencyBudget(0.6, of_plain=True, batch_size=8),
            ),
            (("--thresholds", 0.9), FixedThresholds((0.9,))),
            (("--thresholds", 0.9, 0.8), FixedThresholds((0.9, 0.8))),
            (
                ("--criterion", "entropy", "--thresholds", "-0.3"),
                FixedThresholds((-0.3,), criterion="entropy"),
            ),
            (("--risk", 2), Risk(0.02, confidence=0.95, loss="wrong")),
            (
                ("--risk", 2, "--confidence", 90, "--loss", "differs"),
                Risk(0.02, confidence=0.9, loss="differs"),
            ),
            (("--risk", 2, "--on-average"), Risk(0.02, confidence=None)),
            (("--delta", 0.9), ConditionalDeepLearning(0.9)),
            (("--delta", 0.9, "--epsilon", 1), ConditionalDeepLearning(0.9, epsilon=0.01)),
        ],
    )
    def test_one_goal(self, flags, goal):
        assert settings.goal_of(parsed(*flags)) == goal

    def test_a_policy_file(self, tmp_path):
        policy = Policy(exit_names=("layer1", "final"), thresholds=(0.9,))
        policy.save(tmp_path / "policy.yaml")
        found = settings.goal_of(parsed("--policy", tmp_path / "policy.yaml"))
        assert found == FixedPolicy(policy)

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (("--confidence", 90), ("--confidence", "--risk")),
            (("--on-average",), ("--on-average", "--risk")),
            (("--loss", "wrong"), ("--loss", "--risk")),
            (("--budget", 50, "--loss", "wrong"), ("--loss", "--risk")),
            (("--latency-batch", 4), ("--latency-batch", "--latency-budget", "--minimise")),
            (("--minimise", "macs", "--latency-batch", 4), ("--latency-batch", "seconds")),
            (("--minimise", "seconds", "--latency-batch", 0), ("--latency-batch", 0)),
            (("--budget", 50, "--minimise", "seconds"), ("--minimise", "--budget")),
            (("--risk", 1, "--minimise", "macs"), ("--minimise", "--risk")),
            (("--epsilon", 0), ("--epsilon", "--delta")),
            (("--risk", 2, "--on-average", "--confidence", 90), ("--on-average", "--confidence")),
            (("--risk", 2, "--confidence", 0), ("--confidence", 0)),
            (("--latency-budget", 3), ("--latency-budget", "'3'", "3ms", "60%")),
            (("--latency-budget", "xms"), ("--latency-budget", "'xms'")),
            (("--latency-budget", "infms"), ("--latency-budget", "inf")),
            (("--latency-budget", "1e999%"), ("--latency-budget", "inf")),
            (("--policy", "none.yaml", "--criterion", "margin"), ("--policy",)),
            (("--policy", "none.yaml", "--no-calibration"), ("--policy",)),
            (("--policy", "none.yaml"), ("none.yaml",)),
        ],
    )
    def test_flags_that_contradict_or_miss_their_goal(self, flags, named):
        assert_names(refusal(settings.goal_of, parsed(*flags)), *named)

    def test_two_goals(self):
        message = refusal(parsed, "--budget", 50, "--max-drop", 1)
        assert_names(message, "--budget", "--max-drop")


class TestEvaluationOptions:
    def test_defaults(self):
        assert settings.evaluation_options(parsed()) == {
            "runtimes": (None,),
            "overrides": {},
            "val_from": "train",
            "cut_seed": 0,
            "cuts": 1,
            "name": None,
            "base": None,
            "out": None,
            "rounded_to": None,
            "live": True,
            "draw": True,
        }

    def test_what_is_timed(self):
        found = settings.evaluation_options(
            parsed("--batch-sizes", 4, 8, "--timing-images", 16, "--runtime", "fastest")
        )
        assert (found["batch_sizes"], found["timing_images"]) == ((4, 8), 16)
        fastest = parsed("--batch-sizes", 4, "--runtime", "fastest", "--no-live")
        assert settings.evaluation_options(fastest)["batch_sizes"] == (4,)

    @pytest.mark.parametrize("flags", [("--batch-sizes", 4), ("--timing-images", 9)])
    def test_what_is_timed_without_timing(self, flags):
        message = refusal(settings.evaluation_options, parsed(*flags, "--no-live"))
        assert_names(message, flags[0], "--no-live", "remove")

    def test_weights_can_be_rounded(self):
        found = settings.evaluation_options(parsed("--weights", "float16"))
        assert found["rounded_to"] == "float16"

    def test_several_runtimes_are_named_after_one_flag_or_several(self):
        flags = ("--runtime", "torch", "onnxruntime", "--runtime", "openvino-bf16")
        found = settings.evaluation_options(parsed(*flags))
        assert found["runtimes"] == ("torch", "onnxruntime", "openvino-bf16")

    def test_settings_of_the_machine_override_the_runs(self):
        found = settings.evaluation_options(parsed("--threads", 2, "--no-live", "--no-plots"))
        assert found["overrides"] == {"run": {"threads": "2"}}
        assert (found["live"], found["draw"]) == (False, False)

    def test_a_policy_files_evaluation_is_named_after_it(self):
        found = settings.evaluation_options(parsed("--policy", "here/mine.yaml"))
        assert (found["name"], found["base"]) == (None, "policy-mine")
        found = settings.evaluation_options(parsed("--policy", "runs/a/eval/cheap/policy.yaml"))
        assert found["base"] == "policy-a-cheap"
        found = settings.evaluation_options(parsed("--policy", "models/dear/policy.yaml"))
        assert found["base"] == "policy-dear"
        named = settings.evaluation_options(parsed("--policy", "here/mine.yaml", "--name", "x"))
        assert named["name"] == "x"

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (("--cuts", 0), ("--cuts", 0)),
            (("--timing-images", 0), ("--timing-images", 0)),
            (("--batch-sizes", 8, 0), ("--batch-sizes", 0)),
            (("--cut-seed=-1",), ("--cut-seed", -1)),
            (("--name", "a/b"), ("--name", "a/b")),
            (("--name", ".."), ("--name", "'..'")),
        ],
    )
    def test_values_that_are_out_of_range(self, flags, named):
        assert_names(refusal(settings.evaluation_options, parsed(*flags)), *named)
