"""Evaluations in several runtimes: which, how they are named, and what their reports show."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import CPU, TASK, assert_names, few_digits, refusal, tiny_network, tiny_run

from cifar10.resnet import ResNet
from early_exit.choosing.goals import Budget, FixedThresholds, LatencyBudget, MaxDrop
from early_exit.classifier import load
from early_exit.cli.evaluation_flags import evaluation_parser
from early_exit.cli.program import evaluate as evaluate_flags
from early_exit.config import Config, DataConfig, ModelConfig
from early_exit.evaluation import evaluate as evaluation
from early_exit.evaluation import runtimes
from early_exit.evaluation.evaluate import evaluate, evaluate_each
from early_exit.evaluation.markdown import sections, summary, to_markdown
from early_exit.evaluation.report import Report
from early_exit.evaluation.report_seconds import RuntimeRow, RuntimeSeconds
from early_exit.evaluation.runtimes import (
    check_settings,
    default_name,
    evaluation_name,
    with_default,
)
from early_exit.evaluation.seconds import runtime_table, segment_table, timing_table
from early_exit.evaluation.upgrade import read_report
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.task import StaticNetwork, Task

WITH_STATIC = Task(
    tiny_network,
    lambda settings: few_digits(settings.split_seed),
    static_networks=lambda config, num_classes: [
        StaticNetwork("resnet8", 0.75, "nobody", lambda: ResNet(1))
    ],
)
TIMED = {"overrides": CPU, "batch_sizes": (1, 4), "timing_images": 8, "draw": False}
UNTIMED = {"overrides": CPU, "live": False, "draw": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two epochs with two early exits. Not to be changed."""
    return tiny_run(tmp_path_factory.mktemp("runtimes") / "run", WITH_STATIC)


@pytest.fixture(scope="module")
def timed(run, tmp_path_factory) -> tuple[Report, Path]:
    """An evaluation of it in torch, timed. Not to be changed."""
    copy = shutil.copytree(run, tmp_path_factory.mktemp("timed") / "run")
    return evaluate(copy, WITH_STATIC, FixedThresholds((0.2, 0.3)), runtime="torch", **TIMED)


@pytest.fixture
def pretended(monkeypatch):
    """Runtimes of other names, all of them eager torch: where they are only told apart."""

    def find(name, device="cpu", threads=None):
        return EagerRuntime(name, "int8" if name.endswith("int8") else "f32", torch.device(device))

    monkeypatch.setattr("early_exit.trained.find_runtime", find)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "runtime", "several", "expected"),
        [
            (None, None, False, "max-drop-0.5-max_prob"),
            (None, "torch", True, "max-drop-0.5-max_prob"),
            (None, "onnxruntime", False, "max-drop-0.5-max_prob-onnxruntime"),
            (None, "torch-bf16", False, "max-drop-0.5-max_prob-torch-bf16"),
            ("mine", "onnxruntime", False, "mine"),
            ("mine", "onnxruntime", True, "mine-onnxruntime"),
            ("mine", "torch", True, "mine"),
        ],
    )
    def test_the_runtime_is_appended(self, name, runtime, several, expected):
        base = default_name(MaxDrop(0.005))
        assert evaluation_name(base, name, runtime, several) == expected

    @pytest.mark.parametrize(
        ("goal", "expected"),
        [
            (MaxDrop(0.005, "seconds"), "max-drop-0.5-seconds-batch-1-max_prob-openvino"),
            (MaxDrop(0.01, "seconds", 64), "max-drop-1-seconds-batch-64-max_prob-openvino"),
            (LatencyBudget(0.003), "latency-3-ms-at-batch-1-max_prob-openvino"),
            (Budget(0.5), "budget-50-max_prob-openvino"),
        ],
    )
    def test_goals_in_seconds(self, goal, expected):
        assert evaluation_name(default_name(goal), None, "openvino", False) == expected


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"amp": "bf16"}, ("--amp bf16", "--runtime torch-bf16")),
            ({"compile": True}, ("--compile", "--runtime compile")),
            ({"compile": True, "amp": "bf16"}, ("--runtime compile-bf16",)),
        ],
    )
    def test_a_runtime_and_settings_that_say_the_same(self, run, settings, named):
        options = {"overrides": {"run": settings}, "runtime": "onnxruntime"}
        assert_names(refusal(evaluate, run, TASK, MaxDrop(0.0), **options), *named)

    def test_auto_is_the_precision_of_no_runtime(self):
        message = refusal(check_settings, ("onnxruntime",), {"run": {"amp": "auto"}})
        assert_names(message, "remove --amp auto")
        assert "--runtime torch" not in message

    @pytest.mark.parametrize("settings", [{"compile": "false"}, {"amp": "off"}, {"threads": "2"}])
    def test_settings_that_change_nothing(self, settings):
        check_settings(("onnxruntime",), {"run": settings})

    @pytest.mark.parametrize(
        ("name", "nearest"), [("onnxrt", "onnxruntime"), ("fastes", "fastest")]
    )
    def test_an_unknown_runtime_is_named_before_anything_is_read(self, tmp_path, name, nearest):
        options = {"runtimes": ("torch", name), **UNTIMED}
        message = refusal(evaluate_each, tmp_path / "none", TASK, MaxDrop(0.0), **options)
        assert_names(message, f"'{name}'", f"did you mean {nearest}")

    def test_a_name_that_is_too_long_with_the_runtime(self, run):
        options = {"runtimes": ("torch", "onnxruntime"), "name": "a" * 250, **UNTIMED}
        assert_names(refusal(evaluate_each, run, TASK, MaxDrop(0.0), **options), "--name")


MS = {"torch": 3, "torch-bf16": 2, "onnxruntime": 1.5, "onnxruntime-int8": 0.5, "compile": 0.7}


class TestFastest:
    """The choice from constructed times."""

    @pytest.fixture
    def chosen(self, run, tmp_path, monkeypatch, pretended):
        """The runtimes of the evaluations, and the batch that was timed."""
        batches = []

        def seconds(networks, images):
            batches.append(len(images))
            return {name: MS[name] / 1000 for name in networks}

        monkeypatch.setattr(runtimes, "available_runtimes", lambda _: list(MS))
        monkeypatch.setattr(runtimes, "plain_seconds", seconds)

        def choose(*names, goal=None, **options):
            copy = shutil.copytree(run, tmp_path / "run")
            found = evaluate_each(
                copy,
                TASK,
                goal or FixedThresholds((0.2,)),
                runtimes=names,
                **{**UNTIMED, **options},
            )
            return [report.environment.runtime for report, _ in found], batches

        return choose

    def test_8_bit_integers_and_compiling_are_left_out(self, chosen, caplog):
        with caplog.at_level(logging.INFO):
            assert chosen("fastest")[0] == ["onnxruntime"]
        assert_names(caplog.text, "torch 3.00 ms", "onnxruntime 1.50 ms", "fastest is onnxruntime")

    def test_one_that_is_named_too_is_evaluated_once(self, chosen):
        assert chosen("onnxruntime", "fastest", "torch")[0] == ["onnxruntime", "torch"]

    @pytest.mark.parametrize(
        ("goal", "size"), [(None, 8), (MaxDrop(0.1, "seconds", batch_size=2), 2)]
    )
    def test_at_the_goals_batch_size_or_the_first_one(self, chosen, goal, size):
        assert chosen("fastest", goal=goal, batch_sizes=(8, 4))[1] == [size]

    def test_the_evaluation_is_named_after_the_runtime_that_was_found(self, chosen, tmp_path):
        chosen("fastest", base="policy-mine")
        names = [path.name for path in (tmp_path / "run" / "eval").iterdir()]
        assert names == ["policy-mine-onnxruntime"]


def test_times_of_the_plain_network_are_medians_measured_in_turns(monkeypatch):
    """On a clock that is slow for every third turn."""
    cpu, order = torch.device("cpu"), []
    network = tiny_network(Config(model=ModelConfig(exits=())), 10).eval()
    images = torch.zeros(2, *network.image_shape)
    networks = {
        name: RuntimeNetwork(network, EagerRuntime(name, "f32", cpu), images) for name in "ab"
    }

    def make_timer(measured):
        name = measured.runtime.name

        def timer(call):
            assert call().shape == (2, 10)
            order.append(name)
            return 100.0 if order.count(name) % 3 == 0 else {"a": 1.0, "b": 2.0}[name]

        return timer

    monkeypatch.setattr(runtimes, "make_timer", make_timer)
    assert runtimes.plain_seconds(networks, images) == {"a": 1.0, "b": 2.0}
    assert sorted(order) == ["a"] * runtimes.TURNS + ["b"] * runtimes.TURNS


class TestSeveral:
    def test_each_is_named_and_all_are_in_every_report(self, run, tmp_path, pretended):
        copy = shutil.copytree(run, tmp_path / "run")
        goal = FixedThresholds((0.2,))
        options = {"runtimes": ("torch", "openvino"), "name": "mine", **UNTIMED}
        found = evaluate_each(copy, TASK, goal, **options)
        assert [directory.name for _, directory in found] == ["mine", "mine-openvino"]
        rows = [row.runtime for row in found[0][0].runtimes]
        assert rows == ["torch", "openvino"] and found[1][0].runtimes == found[0][0].runtimes
        assert {path.name for path in (copy / "records").iterdir() if path.is_dir()} == {
            *("val-off", "test-off"),
            *("val-openvino", "test-openvino"),
        }
        for _, directory in found:
            stored = read_report(directory / "report.json")
            assert [row["evaluation"] for row in stored["runtimes"]] == ["mine", "mine-openvino"]
            assert "## Runtimes" in (directory / "report.md").read_text()

    def test_one_that_fails_leaves_the_reports_of_those_before(
        self, run, tmp_path, pretended, monkeypatch
    ):
        evaluate_one = evaluation._evaluate_one

        def fail(trained, *arguments):
            if trained.runtime.runtime.name == "openvino":
                raise RuntimeError("no memory")
            return evaluate_one(trained, *arguments)

        monkeypatch.setattr(evaluation, "_evaluate_one", fail)
        copy = shutil.copytree(run, tmp_path / "run")
        options = {"runtimes": ("torch", "openvino"), "name": "mine", **UNTIMED}
        with pytest.raises(RuntimeError, match="no memory"):
            evaluate_each(copy, TASK, FixedThresholds((0.2,)), **options)
        (directory,) = (copy / "eval").iterdir()
        assert directory.name == "mine" and (directory / "report.md").exists()
        assert read_report(directory / "report.json")["runtimes"] == []

    def test_one_alone_has_no_table(self, timed):
        assert timed[0].runtimes == ()
        assert "runtimes" not in [section.id for section in sections(timed[0])]

    def test_the_screen_shows_the_table_once_at_the_end(self, run, tmp_path, pretended, capsys):
        copy = shutil.copytree(run, tmp_path / "run")
        flags = ["--thresholds", "0.2", "--no-live", "--no-plots", "--runtime", "torch", "openvino"]
        parser = evaluation_parser("cifar10/eval.py", "trainer.py", None)
        args = parser.parse_args([str(copy), *flags, "--device", "cpu", "--threads", "1"])
        evaluate_flags(args, TASK)
        shown = capsys.readouterr().out
        assert shown.count("| runtime |") == 1
        last = shown.rstrip().splitlines()[-2:]
        assert [line.split(" | ")[0] for line in last] == [
            "| torch (float32)",
            "| openvino (float32)",
        ]


def test_the_exits_to_time_are_not_chosen_on_test_images_of_another_cut(run, tmp_path, monkeypatch):
    """If only some are timed: val of one cut has test images of the others."""
    copy = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(evaluation, "time_for_choice", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(evaluation, "MANY_EXITS", 1)
    goal = MaxDrop(0.1, "seconds", batch_size=2)
    options = {"val_from": "test", "cuts": 2, **UNTIMED}
    message = refusal(evaluate, copy, TASK, goal, **options)
    assert_names(message, "--cuts", "1 of the 2 early exits")
    monkeypatch.setattr(evaluation, "MANY_EXITS", 2)
    with pytest.raises(pytest.fail.Exception, match="timed"):
        evaluate(copy, TASK, goal, **options)


def test_the_table_has_a_row_for_each_runtime_and_batch_size():
    seconds = (
        RuntimeSeconds(1, 0.002, 0.001, 2.0, (1.9, 2.1)),
        RuntimeSeconds(64, 0.02, 0.01, 2.0, (1.9, 2.1)),
    )
    rows = [
        RuntimeRow("torch", "float32", "a", 0.9, 0.5, seconds, ()),
        RuntimeRow("openvino-bf16", "bfloat16", "max_prob-b", 0.8, 0.6, (), ()),
    ]
    lines = runtime_table(rows).splitlines()[2:]
    assert_names(lines[0], "torch (float32)", "`a`", "90.00 %", "50.0 %", "2.00 ms", "1.00 ms")
    assert_names(lines[0], "2.00 x")
    assert_names(lines[1], 64, "20.00 ms", "(1.90 to 2.10)")
    assert_names(lines[2], "openvino-bf16 (bfloat16)", "`max_prob-b`", "80.00 %")
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 3


class TestOneReport:
    """Of an evaluation in torch."""

    def test_the_verdicts_are_the_first_thing(self, timed, tmp_path):
        report, _ = timed
        words = [verdict.words for verdict in report.verdicts]
        assert [verdict.batch_size for verdict in report.verdicts] == [1, 4]
        assert summary(report, tmp_path).startswith(words[0])
        first, *_ = to_markdown(report, {}).partition("\n\n")[2].split("\n\n")
        assert words[0] in first.replace("\\", "")

    def test_they_are_stored(self, timed):
        report, directory = timed
        stored = json.loads((directory / "report.json").read_text())
        assert [row["words"] for row in stored["verdicts"]] == [v.words for v in report.verdicts]

    def test_without_timing_there_is_none(self, run, tmp_path):
        copy = shutil.copytree(run, tmp_path / "run")
        report, directory = evaluate(copy, TASK, FixedThresholds((0.2,)), **UNTIMED)
        assert report.verdicts == ()
        assert summary(report, directory).startswith("| exit |")

    def test_an_older_report_has_none_and_is_of_torch(self, timed, tmp_path):
        report = json.loads((timed[1] / "report.json").read_text())
        for name in ("verdicts", "runtimes"):
            del report[name]
        del report["environment"]["runtime"]
        (tmp_path / "report.json").write_text(json.dumps(report))
        found = read_report(tmp_path / "report.json")
        assert (found["verdicts"], found["runtimes"]) == ([], [])
        assert found["environment"]["runtime"] == "torch"

    def test_runtime_and_precision_stand_wherever_seconds_do(self, timed):
        report = dataclasses.replace(timed[0])
        changed = dataclasses.replace(
            report,
            environment=dataclasses.replace(
                report.environment, runtime="openvino-bf16", precision="bfloat16"
            ),
        )
        for table in (timing_table(changed), segment_table(changed)):
            assert "openvino-bf16 (bfloat16)" in table
        (seconds,) = (part for part in sections(changed) if part.id == "seconds")
        assert seconds.body.count("openvino-bf16 (bfloat16)") >= 3
        assert_names(sections(changed)[-1].body, "runtime openvino-bf16", "precision bfloat16")

    def test_the_static_networks_stand_beside_it(self, timed):
        (seconds,) = (part for part in sections(timed[0]) if part.id == "seconds")
        lines = [line for line in seconds.body.splitlines() if line.startswith("| resnet8 |")]
        assert len(lines) == 2 and all("75.00 %" in line for line in lines)


@pytest.mark.slow
class TestOnnxRuntime:
    """The whole walk in torch and in ONNX Runtime."""

    @pytest.fixture(scope="class")
    @classmethod
    def found(cls, run, tmp_path_factory) -> list[tuple[Report, Path]]:
        """Reports and directories. Not to be changed."""
        for name in ("onnxruntime", "onnxscript"):
            pytest.importorskip(name)
        copy = shutil.copytree(run, tmp_path_factory.mktemp("onnx") / "run")
        goal = MaxDrop(0.1, "seconds", batch_size=4)
        options = {**TIMED, "draw": True}
        return evaluate_each(copy, WITH_STATIC, goal, runtimes=("torch", "onnxruntime"), **options)

    def test_each_is_chosen_run_and_timed_in_its_own_runtime(self, found):
        assert [report.environment.ran_in for report, _ in found] == [
            "torch (float32)",
            "onnxruntime (float32)",
        ]
        for report, directory in found:
            assert len(report.verdicts) == len(report.timing) == 2
            assert report.live and report.live.differing_beyond_rounding == 0
            assert report.environment.runtime in report.verdicts[0].words
            assert set(report.timing[0].networks) == {"resnet8"}
            assert (directory / "report.html").exists()
        assert found[1][1].name == "max-drop-10-seconds-batch-4-max_prob-onnxruntime"

    def test_the_policy_is_applied_in_the_runtime_it_was_chosen_in(self, found):
        images = TASK.load_data(DataConfig()).splits["test"].images[:7]
        answers = {}
        for runtime in (None, "torch"):
            classify = load(found[1][1], task=WITH_STATIC, device="cpu", runtime=runtime)
            assert classify.runtime.runtime.name == (runtime or "onnxruntime")
            answers[runtime] = classify.answer(images)
            assert isinstance(answers[runtime].logits, torch.Tensor)
        # of 16x16 images, a logit is a sum of at most some thousand products on each path
        bound = 3000 * torch.finfo(torch.float32).eps * answers["torch"].logits.abs().max()
        same = answers[None].exit_index == answers["torch"].exit_index
        difference = answers[None].logits - answers["torch"].logits
        assert same.sum() >= 6 and difference[same].abs().max() <= bound


class TestLoad:
    def named(self, evaluated_copy: Path, runtime: str, precision: str = "float32") -> Path:
        """A run with an evaluation that says it was in another runtime."""
        path = evaluated_copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        report["environment"] |= {"runtime": runtime, "precision": precision}
        path.write_text(json.dumps(report))
        return evaluated_copy

    def test_a_runtime_that_is_not_here(self, evaluated_copy):
        run = self.named(evaluated_copy, "abacus")
        message = refusal(load, run, "mine", task=TASK, device="cpu")
        assert_names(message, "'abacus'", "load it with --runtime torch")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"amp": "off"}, None),
        ({"amp": "bf16"}, "torch-bf16"),
        ({"compile": True}, "compile"),
        ({"compile": True, "amp": "fp16"}, "compile-fp16"),
    ],
)
def test_an_evaluation_is_named_after_what_its_settings_say(settings, expected):
    """Otherwise it would replace the one in float32."""
    assert with_default([None, "openvino"], {"run": settings}) == [expected, "openvino"]


def test_automatic_precision_is_named_as_it_is_chosen(monkeypatch):
    monkeypatch.setattr(runtimes, "choose_precision", lambda *_: "bf16")
    assert with_default([None], {"run": {"amp": "auto", "device": "cpu"}}) == ["torch-bf16"]
