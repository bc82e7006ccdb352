"""The benchmarks run, print what they measured, and refuse mistakes in one line."""

import argparse
import dataclasses
import json
import re

import pytest
import yaml
from helpers import finish, make_folders, run_main, start

from benchmarks import equality, heads, inference, streams, training

TINY = (
    "--arch",
    "resnet20",
    "--images",
    "64",
    "--batch-sizes",
    "1",
    "32",
    "--seconds",
    "0.2",
    "--device",
    "cpu",
)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs benchmarks/inference.py: exit code, stdout, stderr."""
    return lambda *flags: run_main(inference.main, "inference.py", monkeypatch, capsys, *flags)


@pytest.mark.slow
def test_inference_names_the_precision_and_measures_every_batch_size(run):
    code, out, err = run(*TINY, "--exit-shares", "0.5", "0.25")
    assert (code, err) == (0, "")
    assert "float32" in out
    assert_shares(out, (0.5, 0.25, 0.25))
    rows = re.findall(r"^\| torch \| (\d+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ x \| ", out, re.M)
    assert [row[0] for row in rows] == ["1", "32"]
    assert all(float(value) > 0 for row in rows for value in row)


def test_shares_of_few_images_are_rounded(run):
    flags = ("--arch", "resnet20", "--images", "3", "--batch-sizes", "1", "--seconds", "0.1")
    code, _, err = run(*flags, "--device", "cpu", "--exit-shares", "0.5", "0.5")
    assert (code, err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["entropy", "margin"])
def test_the_wanted_shares_exit_by_any_criterion(run, criterion):
    _, out, _ = run(*TINY, "--criterion", criterion, "--exit-shares", "0.25", "0.5")
    assert_shares(out, (0.25, 0.5, 0.25))


def assert_shares(out, expected):
    """So many of 64 images took each exit, as it is printed: but for one of each exit, whose score
    is the threshold and comes out of other rows than when the threshold was chosen."""
    shares = re.findall(r"(layer1|layer2|final) (\d+) %", out)
    assert [name for name, _ in shares] == ["layer1", "layer2", "final"]
    for (_, share), wanted in zip(shares, expected, strict=True):
        assert abs(int(share) / 100 - wanted) <= 2 / 64 + 0.005


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--exit-shares", "0.5"), ["--exit-shares", "2"]),
        (("--exit-shares", "0.6", "0.6"), ["--exit-shares", "2"]),
        (("--images", "100", "--batch-sizes", "256"), ["--batch-sizes", "--images", "100"]),
        (("--runtime", "tensorflow"), ["tensorflow"]),
        (("--criterion", "patience"), ["--criterion", "patience"]),
        (("--exits", "layr1", "layer2"), ["layr1", "layer1"]),
        (("--exits", "layer2", "layer1"), ["--exit-shares", "--exits layer1 layer2"]),
    ],
)
def test_mistakes_end_in_one_line(run, flags, named):
    code, _, err = run(*flags)
    assert code == 2
    assert err.startswith("inference.py: ") and err.count("\n") == 1
    assert all(part in err for part in named)


@pytest.mark.slow
def test_training_compares_the_loops(tmp_path):
    flags = ("--steps", "1", "--turns", "1", "--device", "cpu")
    done = finish(start("benchmarks/training.py", *flags, cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    ratios = re.findall(r"ratio ([\d.]+) ", done.stdout)
    assert len(ratios) == 2 and all(float(ratio) > 0 for ratio in ratios)


to_accuracy = training.to_accuracy  # benchmarks.to_accuracy would be another module


class TestToAccuracy:
    def test_the_times_by_hand(self, monkeypatch, capsys):
        """Two turns of two steps. Usual: 200 epochs of 50,000 images, 0.128 and 0.256 s for 128.
        Ours: 43 steps an epoch, 3 epochs at 0.5 s and 9 at 0.25, and 12 times 10 batches of val."""
        seconds = {
            "usual": [0.256, 0.512],
            "trained": [1.0] * 2,
            "frozen": [0.5] * 2,
            "val": [0.2] * 2,
        }
        monkeypatch.setattr(to_accuracy, "time_in_turns", lambda *_: seconds)
        monkeypatch.setattr(to_accuracy, "start_up_seconds", lambda _: 5.0)
        flags = ("--to-accuracy", "--steps", "2", "--turns", "2", "--device", "cpu")
        code, out, err = run_main(training.main, "training.py", monkeypatch, capsys, *flags)
        assert (code, err) == (0, "")
        assert "2 turns of 2 timed steps" in out
        # 15,000 s and 161.25 s; with 12 s of validation and 5 s of start-up 178.25 s
        for part in (": 250.0 min (92.63 %", ": 2.7 min (", ": 0.2 min; start-up: 5.0 s"):
            assert part in out
        assert "93.0 (turns 62.0 to 124.0)" in out and "84.2 (turns 56.1 to 112.2)" in out

    @pytest.mark.parametrize("frozen", [False, True])
    def test_its_steps_are_the_recipes(self, tmp_path, monkeypatch, frozen):
        preset = yaml.safe_load(to_accuracy.PRESET.read_text())
        preset["optim"]["batch_size"] = 8
        (tmp_path / "fast.yaml").write_text(yaml.safe_dump(preset))
        monkeypatch.setattr(to_accuracy, "PRESET", tmp_path / "fast.yaml")
        monkeypatch.setattr(to_accuracy, "IMAGES", 40)
        monkeypatch.setattr(to_accuracy, "VAL", 20)
        args = argparse.Namespace(device="cpu", amp="off")
        run = to_accuracy.start_fast(args)
        monkeypatch.setattr(to_accuracy, "start_fast", lambda _: run)
        before = {name: value.clone() for name, value in run.network.named_parameters()}
        steps = to_accuracy.fast_steps(args, frozen)
        for _ in range(3):  # of an epoch of two
            next(steps)
        moved = {
            name for name, value in run.network.named_parameters() if (value != before[name]).any()
        }
        fixed = {f"backbone.{name}" for name in run.network.fixed}
        assert "backbone.whiten.weight" in fixed
        assert set(before) - moved == fixed | ({"backbone.whiten.bias"} if frozen else set())
        next(to_accuracy.fast_validation(args))
        assert not run.network.training

    @pytest.mark.parametrize("flags", [("--arch", "resnet20"), ("--compile",), ("--profile",)])
    def test_a_flag_without_effect_is_refused(self, monkeypatch, capsys, flags):
        flags = ("--to-accuracy", *flags)
        code, _, err = run_main(training.main, "training.py", monkeypatch, capsys, *flags)
        assert code == 2 and err.startswith(f"training.py: {flags[1]} ") and err.count("\n") == 1


@pytest.mark.slow
def test_training_shows_where_the_time_goes(tmp_path):
    flags = ("--profile", "--steps", "1", "--device", "cpu")
    done = finish(start("benchmarks/training.py", *flags, cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    # whatever kernels a processor has: a step of ResNet-20 calls 19 convolutions and 19 BatchNorms
    calls = re.findall(r"^\s*aten::\w+ .* (\d+)\s*$", done.stdout, re.MULTILINE)
    assert 0 < len(calls) <= 12 and "19" in calls


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_loading_compares_the_pipelines(tmp_path, own):
    flags = ("--steps", "2", "--turns", "1", "-b", "8", "-j", "1", "--device", "cpu")
    if own:
        flags = (make_folders(tmp_path / "set"), *flags, "--crop", "16")
    done = finish(start("benchmarks/loading.py", *flags, cwd=tmp_path))
    assert done.returncode == 0, done.stderr
    (ratio,) = re.findall(r"ratio ([\d.]+) ", done.stdout)
    assert float(ratio) > 0


@pytest.mark.slow
def test_a_loop_that_fails_ends_the_benchmark(tmp_path):
    done = finish(start("benchmarks/training.py", "--arch", "resnet21", cwd=tmp_path))
    assert done.returncode == 2
    assert re.search(r"^training\.py: .*'usual'", done.stderr, re.MULTILINE)


@pytest.fixture
def run_streams(monkeypatch, capsys):
    """A function that runs benchmarks/streams.py: exit code, stdout, stderr."""
    return lambda *flags: run_main(streams.main, "streams.py", monkeypatch, capsys, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_streams_compares_with_infer_and_the_plain_network(run_streams, runtime):
    if runtime != "torch":
        pytest.importorskip(runtime)
        pytest.importorskip("onnxscript")
    flags = ("--runtime", runtime, "--repeats", "1", "--exits", "layer1", "--exit-shares", "0.5")
    small = ("--arch", "resnet20", "--images", "64", "--batch-sizes", "8", "48", "--device", "cpu")
    code, out, err = run_streams(*flags, *small)
    assert (code, err) == (0, "")
    shares = re.findall(r"(?:layer1|final) (\d+) %", out)
    assert all(abs(int(share) - 50) <= 2 for share in shares)  # the threshold is some image's score
    number, ratio = r"(\d+) \| ", r"([\d.]+) \([\d.]+ to [\d.]+\) \| "
    rows = re.findall(rf"^\| {runtime} \| {number * 4}{ratio * 2}([\d.]+) \|$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["8", "48"]
    assert all(float(value) > 0 for row in rows for value in row)


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--repeats", "0"), ["--repeats", "0"]),
        (("--exit-shares", "0.5"), ["--exit-shares", "2"]),
    ],
)
def test_streams_refuses_mistakes_in_one_line(run_streams, flags, named):
    code, _, err = run_streams(*flags)
    assert code == 2
    assert err.startswith("streams.py: ") and err.count("\n") == 1
    assert all(part in err for part in named)


@pytest.mark.slow
def test_heads_are_timed_at_every_place_and_batch_size(monkeypatch, capsys):
    flags = ("--arch", "resnet20", "--batch-sizes", "1", "2", "--turns", "2")
    code, out, err = run_main(
        heads.main, "heads.py", monkeypatch, capsys, *flags, "--heads", "conv", "pooled"
    )
    assert (code, err) == (0, "")
    rows = re.findall(r"^\| torch \| (\d) \| (\S+) \| [\d.]+ \| .* \| .* \|$", out, re.MULTILINE)
    assert rows == [("1", "layer2.0"), ("1", "layer3.0"), ("2", "layer2.0"), ("2", "layer3.0")]
    assert "conv head, ms" in out and "pooled head, ms" in out


@pytest.mark.parametrize("flags", [("--turns", "0"), ("--batch-sizes", "0"), ("--threads", "0")])
def test_nothing_to_time_is_refused(monkeypatch, capsys, flags):
    code, _, err = run_main(heads.main, "heads.py", monkeypatch, capsys, *flags)
    assert code == 2 and flags[0] in err


class TestEquality:
    FLAGS = ("--task", "helpers:TASK", "--device", "cpu", "--threads", "1")

    def test_every_batch_size_gives_the_record(self, evaluated_run, monkeypatch, capsys):
        run = evaluated_run / "eval" / "mine"
        flags = (run, *self.FLAGS, "--batch-sizes", "1", "7")
        code, out, _ = run_main(equality.main, "equality.py", monkeypatch, capsys, *flags)
        assert code == 0
        rows = re.findall(r"^\| torch \| f32 \| (\d) \| (\d+) \| .* \| 0 \| \S+ \|$", out, re.M)
        assert [size for size, _ in rows] == ["1", "7"]
        assert len({images for _, images in rows}) == 1

    def test_no_accuracy_of_images_that_chose_the_policy(self, evaluated_copy, monkeypatch, capsys):
        path = evaluated_copy / "eval" / "mine" / "report.json"
        report = json.loads(path.read_text())
        report["choice"]["val_from"] = "half of the official test set, cut by seed 0"
        path.write_text(json.dumps(report))
        flags = (path.parent, *self.FLAGS, "--batch-sizes", "7")
        code, out, _ = run_main(equality.main, "equality.py", monkeypatch, capsys, *flags)
        assert code == 0 and re.search(r"^\| torch \| f32 \| 7 \| \d+ \| - \| ", out, re.M)

    def test_a_difference_beyond_rounding_is_a_failure(self, evaluated_run, monkeypatch, capsys):
        plain = equality.run_live

        def differing(*arguments):
            return dataclasses.replace(plain(*arguments), differing=3, differing_beyond_rounding=1)

        monkeypatch.setattr(equality, "run_live", differing)
        flags = (evaluated_run / "eval" / "mine", *self.FLAGS, "--batch-sizes", "256")
        code, out, err = run_main(equality.main, "equality.py", monkeypatch, capsys, *flags)
        assert code == 1 and err.splitlines()[-1].startswith("equality.py: 1 ")
        assert re.search(r"\| 2 \| 1 \| \S+ \|$", out, re.M)

    def test_an_empty_batch_is_refused(self, evaluated_run, monkeypatch, capsys):
        flags = (evaluated_run, *self.FLAGS, "--batch-sizes", "0")
        code, _, err = run_main(equality.main, "equality.py", monkeypatch, capsys, *flags)
        assert code == 2 and "--batch-sizes" in err
