"""Configuration: defaults < preset < flags, converted by type, checked when built."""

import argparse
import dataclasses
import inspect
import re
import typing

import pytest
import yaml
from helpers import assert_names, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from early_exit import config as configs
from early_exit.cli.settings import settings_of
from early_exit.config import (
    BackbonePhaseConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)


def from_yaml(text: str) -> Config:
    """The configuration of a preset's text."""
    return configs.build(Config, yaml.safe_load(text))


def test_merging_changes_neither_side():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert configs.merge(base, over) == {"a": {"b": 1, "c": 2}}
    assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}})


class TestConversion:
    def test_yaml_string_1e_4_becomes_a_float(self):
        assert yaml.safe_load("1e-4") == "1e-4"  # what makes this necessary
        assert from_yaml("optim: {weight_decay: 1e-4}").optim.weight_decay == 0.0001

    def test_whole_number_becomes_a_float(self):
        lr = from_yaml("optim: {lr: 1}").optim.lr
        assert lr == 1.0 and isinstance(lr, float)

    def test_whole_float_becomes_an_int(self):
        epochs = from_yaml("optim: {epochs: 30.0}").optim.epochs
        assert epochs == 30 and isinstance(epochs, int)

    def test_bare_off_is_the_word_off(self):
        assert from_yaml("run: {amp: off}").run.amp == "off"

    @pytest.mark.parametrize(
        ("word", "value"), [("true", True), ("on", True), ("'no'", False), ("'off'", False)]
    )
    def test_words_for_true_and_false(self, word, value):
        assert from_yaml(f"optim: {{nesterov: {word}}}").optim.nesterov is value

    def test_null_is_an_absent_optional_setting(self):
        assert from_yaml("run: {threads: null}").run.threads is None

    def test_list_becomes_a_tuple_of_the_right_type(self):
        weights = from_yaml("loss: {weights: [1, '2e-1']}").loss.weights
        assert weights == (1.0, 0.2)

    def test_a_single_value_stands_for_a_list_of_one(self):
        assert from_yaml("model: {exits: layer2}").model.exits == ("layer2",)

    def test_an_empty_list_is_not_absent(self):
        assert from_yaml("model: {exits: []}").model.exits == ()

    @pytest.mark.parametrize(
        ("text", "name", "value"),
        [
            ("optim: {epochs: 1.5}", "optim.epochs", "1.5"),
            ("optim: {epochs: many}", "optim.epochs", "many"),
            ("optim: {epochs: null}", "optim.epochs", "None"),
            ("optim: {epochs: true}", "optim.epochs", "True"),
            ("optim: {lr: fast}", "optim.lr", "fast"),
            ("optim: {lr: [0.1]}", "optim.lr", "0.1"),
            ("optim: {milestones: [early]}", "optim.milestones", "early"),
            ("optim: {nesterov: 2}", "optim.nesterov", "2"),
            ("optim: {nesterov: maybe}", "optim.nesterov", "maybe"),
            ("model: {arch: [resnet20]}", "model.arch", "resnet20"),
            ("model: {arch: {name: resnet20}}", "model.arch", "resnet20"),
            ("optim: {epochs: .inf}", "optim.epochs", "inf"),
            ("optim: {warmup_epochs: .inf}", "optim.warmup_epochs", "inf"),
            ("loss: {teacher_weight: .nan}", "loss.teacher_weight", "nan"),
            ("optim: {epochs: 2020-01-01}", "optim.epochs", "2020"),
        ],
    )
    def test_a_value_of_the_wrong_kind_is_named(self, text, name, value):
        assert_names(refusal(from_yaml, text), name, value)

    @pytest.mark.parametrize(
        ("text", "choices"),
        [
            ("optim: {schedule: linear}", ("step", "cosine", "triangular")),
            ("run: {amp: fp8}", ("auto", "bf16", "fp16", "off")),
            ("run: {regime: both}", ("joint", "mixed", "frozen", "cdl")),
            (
                "model: {head: big}",
                (
                    "conv",
                    "separable",
                    "linear",
                    "pooled",
                    "mixed_pool",
                    "branch1",
                    "branch2",
                    "branch3",
                ),
            ),
        ],
    )
    def test_a_choice_that_is_not_there_lists_those_that_are(self, text, choices):
        assert_names(refusal(from_yaml, text), *choices)

    def test_a_section_that_is_no_mapping_is_named(self):
        assert_names(refusal(from_yaml, "optim: 3"), "optim", 3)


class TestUnknownKeys:
    def test_nearest_setting_of_the_section(self):
        message = refusal(from_yaml, "optim: {momentun: 0.9}")
        assert_names(message, "optim.momentun", "optim.momentum")
        assert "optim.lr" not in message

    def test_nearest_section(self):
        assert_names(refusal(from_yaml, "optimm: {lr: 0.1}"), "optimm", "optim")

    def test_a_setting_without_its_section(self):
        message = refusal(from_yaml, "batch_size: 128")
        assert_names(message, "batch_size", "optim.batch_size")
        assert "optim.lr" not in message

    def test_nothing_near_lists_what_is_known(self):
        message = refusal(from_yaml, "loss: {zzzz: 1}")
        known = ("loss.weights", "loss.start", "loss.distill", "loss.distill_temperature")
        assert_names(message, "loss.zzzz", *known)

    def test_a_key_that_is_no_text(self):
        assert_names(refusal(from_yaml, "7: x"), "'7'")


class TestPresetFile:
    def test_missing(self, tmp_path):
        path = tmp_path / "no.yaml"
        assert_names(refusal(configs.load_preset, path), path, "--config")

    def test_a_directory(self, tmp_path):
        assert_names(refusal(configs.load_preset, tmp_path), tmp_path)

    def test_not_yaml(self, preset):
        path = preset("a: [1,\nb: }")
        assert_names(refusal(configs.load_preset, path), path, "YAML")

    def test_not_text(self, tmp_path):
        path = tmp_path / "preset.yaml"
        path.write_bytes(b"a: \x81\xff")
        assert_names(refusal(configs.load_preset, path), path, "YAML")

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_encodings_of_editors(self, tmp_path, encoding):
        path = tmp_path / "preset.yaml"
        path.write_bytes("optim:\r\n  lr: 1e-3  # größer\r\n".encode(encoding))
        assert configs.build(Config, configs.load_preset(path)).optim.lr == 0.001

    def test_a_tab_is_named_with_its_line(self, preset):
        path = preset("optim:\n\tlr: 0.1\n")
        assert_names(refusal(configs.load_preset, path), path, "line 2")

    def test_a_list(self, preset):
        path = preset("- optim\n- run\n")
        assert_names(refusal(configs.load_preset, path), path, "list")


class TestChecks:
    @pytest.mark.parametrize(
        ("cls", "setting"), [(ModelConfig, "backbone"), (LossConfig, "teacher")]
    )
    def test_an_empty_path(self, cls, setting):
        """Of a variable that is not set."""
        assert f"{setting} is empty" in refusal(cls, **{setting: ""})

    @pytest.mark.parametrize(
        ("cls", "setting", "bad", "least"),
        [
            (OptimConfig, "epochs", 0, 1),
            (OptimConfig, "batch_size", 1, 2),
            (OptimConfig, "weight_decay", -1e-9, 0.0),
            (OptimConfig, "warmup_epochs", -0.5, 0.0),
            (OptimConfig, "stem_epochs", -1, 0),
            (OptimConfig, "start_factor", -0.1, 0.0),
            (OptimConfig, "end_factor", -0.1, 0.0),
            (DataConfig, "pad", -1, 0),
            (OptimConfig, "label_smoothing", -0.1, 0.0),
            (OptimConfig, "momentum", -0.1, 0.0),
            (BackbonePhaseConfig, "epochs", 0, 1),
            (LossConfig, "distill", -0.1, 0.0),
            (RunConfig, "save_every", 0, 1),
            (RunConfig, "print_freq", 0, 1),
            (RunConfig, "threads", 0, 1),
        ],
    )
    def test_least_value(self, cls, setting, bad, least):
        assert getattr(cls(**{setting: least}), setting) == least
        assert setting in refusal(cls, **{setting: bad})

    @pytest.mark.parametrize(
        ("cls", "setting"),
        [
            (OptimConfig, "lr"),
            (OptimConfig, "bias_lr_scale"),
            (OptimConfig, "head_lr_scale"),
            (BackbonePhaseConfig, "lr"),
            (LossConfig, "distill_temperature"),
        ],
    )
    @pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
    def test_positive(self, cls, setting, bad):
        message = refusal(cls, **{setting: bad})
        assert setting in message and f"{bad:g}" in message

    @pytest.mark.parametrize("setting", ["momentum", "label_smoothing"])
    def test_below_one(self, setting):
        assert_names(refusal(OptimConfig, **{setting: 1.0}), f"optim.{setting}", "1.0")

    @pytest.mark.parametrize("bad", [0.0, 1.0, float("nan")])
    def test_a_peak_is_inside_the_phase(self, bad):
        assert_names(refusal(OptimConfig, peak=bad), "optim.peak", bad)

    def test_nesterov_needs_a_momentum(self):
        message = refusal(OptimConfig, nesterov=True, momentum=0.0)
        assert_names(message, "optim.nesterov", "optim.momentum")

    @pytest.mark.parametrize(
        "milestones", [(0.75, 0.5), (100.0, 150.0), (0.0, 0.5), (0.5, 1.0), (float("nan"),)]
    )
    def test_milestones_are_rising_fractions(self, milestones):
        assert_names(refusal(OptimConfig, milestones=milestones), "optim.milestones")

    @pytest.mark.parametrize("seed", [-1, 2**70])
    def test_a_seed_no_generator_takes_is_refused(self, seed):
        assert_names(refusal(RunConfig, seed=seed), "run.seed", seed)
        assert_names(refusal(DataConfig, split_seed=seed), "data.split_seed", seed)

    def test_nothing_can_be_changed_afterwards(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            OptimConfig().lr = 1.0

    def test_every_setting_has_a_docstring(self):
        source = inspect.getsource(configs)
        for section in dataclasses.fields(Config):
            for item in dataclasses.fields(typing.get_type_hints(Config)[section.name]):
                described = rf'^    {item.name}: .*\n    """[^"]+"""$'
                assert re.search(described, source, re.MULTILINE), f"{section.name}.{item.name}"


unhurried = settings(suppress_health_check=[HealthCheck.too_slow])
names = st.text("abcdefgh.0123456789-/", min_size=1, max_size=12)
positive = st.floats(1e-6, 1e6)
optims = st.builds(
    OptimConfig,
    epochs=st.integers(1, 10**6),
    batch_size=st.integers(2, 10**6),
    lr=positive,
    momentum=st.floats(0.01, 0.999),
    nesterov=st.booleans(),
    weight_decay=st.floats(0, 1),
    decay_norm=st.booleans(),
    schedule=st.sampled_from(["step", "cosine", "triangular"]),
    bias_lr_scale=positive,
    head_lr_scale=positive,
    stem_epochs=st.integers(0, 10),
    peak=st.floats(0.01, 0.99),
    start_factor=st.floats(0, 1),
    end_factor=st.floats(0, 1),
    milestones=st.lists(st.floats(0.01, 0.99), max_size=4).map(lambda marks: (*sorted(marks),)),
    warmup_epochs=st.floats(0, 100),
    label_smoothing=st.floats(0, 0.99),
)
whole_configs = st.builds(
    Config,
    data=st.builds(
        DataConfig,
        dataset=names,
        root=st.none() | names,
        split_seed=st.integers(0, 2**31),
        flip=st.sampled_from(["random", "alternating"]),
        pad=st.none() | st.integers(0, 8),
        pad_mode=st.sampled_from(["constant", "reflect"]),
    ),
    model=st.builds(
        ModelConfig,
        arch=names,
        exits=st.none() | st.lists(names, max_size=3).map(tuple),
        head=st.lists(
            st.sampled_from(["conv", "separable", "linear", "mixed_pool", "branch2"]),
            min_size=1,
            max_size=3,
        ).map(tuple),
        backbone=st.none() | names,
    ),
    optim=optims,
    backbone_phase=st.builds(
        BackbonePhaseConfig,
        epochs=st.none() | st.integers(1, 500),
        lr=st.none() | positive,
    ),
    loss=st.builds(
        LossConfig,
        weights=st.none() | st.lists(st.floats(0, 10), max_size=4).map(tuple),
        start=st.none() | positive,
        distill=st.floats(0, 10),
        distill_temperature=positive,
    ),
    run=st.builds(
        RunConfig,
        regime=st.sampled_from(["joint", "mixed", "frozen", "cdl"]),
        seed=st.integers(0, 2**31),
        device=names,
        threads=st.none() | st.integers(1, 64),
        amp=st.sampled_from(["auto", "bf16", "fp16", "off"]),
        channels_last=st.booleans(),
        compile=st.booleans(),
        cuda_graphs=st.booleans(),
        deterministic=st.booleans(),
        save_every=st.integers(1, 100),
        print_freq=st.none() | st.integers(1, 100),
        tensorboard=st.booleans(),
    ),
)


class TestRoundTrips:
    @unhurried
    @given(whole_configs)
    def test_build_undoes_to_dict(self, config):
        assert configs.build(Config, configs.to_dict(config)) == config

    @unhurried
    @given(whole_configs)
    def test_also_through_a_file(self, config):
        written = yaml.safe_dump(configs.to_dict(config), sort_keys=False)
        assert configs.build(Config, yaml.safe_load(written)) == config

    @unhurried
    @given(whole_configs, whole_configs)
    def test_differences_are_none_only_between_equals(self, one, other):
        found = list(configs.differences(configs.to_dict(one), configs.to_dict(other)))
        assert (not found) == (one == other)

    @unhurried
    @given(optims)
    def test_set_takes_what_to_dict_gives(self, optim):
        pairs = []
        for name, value in configs.to_dict(optim).items():
            if isinstance(value, list):
                if len(value) < 2:  # a comma makes the list
                    continue
                value = ",".join(map(repr, value))
            pairs.append(f"optim.{name}={value}")
        given = settings_of(argparse.Namespace(settings={}, set=pairs))
        config = configs.build(Config, given)
        if len(optim.milestones) < 2:
            optim = dataclasses.replace(optim, milestones=OptimConfig().milestones)
        assert config.optim == optim

    def test_differences_name_what_changed(self):
        one = configs.to_dict(Config())
        other = configs.to_dict(Config(optim=OptimConfig(lr=0.5)))
        assert list(configs.differences(one, other)) == [("optim.lr", 0.1, 0.5)]
