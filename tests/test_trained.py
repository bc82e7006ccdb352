"""A run read from its directory: its records, its val images, and which weights it has."""

import dataclasses
import errno
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    TASK,
    Engine,
    assert_close,
    assert_names,
    few_digits,
    forbid,
    refusal,
    require_precision,
    tiny_network,
    tiny_run,
)

from early_exit import trained
from early_exit.classifier import find_evaluation
from early_exit.errors import UserError
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.task import Task
from early_exit.trained import (
    calibration_of,
    evaluations,
    get_record,
    get_splits,
    load_network,
    load_run,
)
from early_exit.training import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A joint run of two epochs with two early exits, already recorded. Not to be changed."""
    directory = tiny_run(tmp_path_factory.mktemp("trained") / "run", TASK)
    get_splits(load_run(directory, TASK, CPU), "train", 0)
    return directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run of the plain network. Not to be changed."""
    return tiny_run(tmp_path_factory.mktemp("plain") / "run", TASK, exits=())


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of `run`, to be changed."""
    return shutil.copytree(run, tmp_path / "run")


class TestEvaluations:
    def test_by_name_in_order(self, tmp_path):
        for name in ("b", "a", ".a.partial", "empty", "@eaDir"):
            (tmp_path / "eval" / name).mkdir(parents=True)
            if name != "empty":
                (tmp_path / "eval" / name / "report.json").touch()
        found = trained.evaluations(tmp_path, "report.json")
        assert list(found) == ["a", "b"]
        assert found["a"] == tmp_path / "eval" / "a" / "report.json"

    def test_there_is_none(self, tmp_path):
        assert trained.evaluations(tmp_path, "report.json") == {}

    def test_one_that_may_not_be_looked_at(self, tmp_path, monkeypatch):
        (tmp_path / "eval" / "mine").mkdir(parents=True)
        forbid(monkeypatch, tmp_path / "eval" / "mine" / "report.json")
        message = refusal(trained.evaluations, tmp_path, "report.json")
        assert_names(message, tmp_path / "eval" / "mine" / "report.json")

    def test_some_that_cannot_be_listed(self, tmp_path, monkeypatch):
        (tmp_path / "eval").mkdir()

        def fail(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

        monkeypatch.setattr(os, "listdir", fail)
        message = refusal(trained.evaluations, tmp_path, "report.json")
        assert_names(message, tmp_path / "eval", os.strerror(errno.EACCES))


def splits_of(directory: Path, val_from: str = "train", cut_seed: int = 0) -> trained.Splits:
    """The records that an evaluation of a run uses."""
    return get_splits(load_run(directory, TASK, CPU), val_from, cut_seed)


class TestBackbonesSplit:
    """Val must be unseen by every weight, the backbone's included."""

    @pytest.fixture(scope="class")
    @classmethod
    def public(cls, plain, tmp_path_factory) -> Path:
        """A frozen run on a backbone of which nothing is known."""
        root = tmp_path_factory.mktemp("public")
        torch.save(checkpoint.load_backbone(plain, {})[0], root / "public.th")
        backbone = str(root / "public.th")
        return tiny_run(root / "run", TASK, backbone=backbone, regime="frozen")

    def test_an_unknown_split_is_refused(self, public):
        assert_names(refusal(splits_of, public), public, "--val-from test")
        assert not (public / "records").exists()

    def test_it_is_accepted_with_val_from_test_and_the_origin_names_the_cut(self, public, tmp_path):
        splits = splits_of(shutil.copytree(public, tmp_path / "run"), "test", 3)
        assert_names(splits.origin, "test", 3)
        assert (len(splits.val), len(splits.test)) == (30, 30)
        assert splits.val.info.split_hash != splits.test.info.split_hash

    @pytest.mark.parametrize("regime", ["frozen", "mixed"])
    def test_a_backbone_of_another_split_is_refused(self, plain, tmp_path, regime):
        run = tiny_run(tmp_path / "run", TASK, split_seed=1, backbone=str(plain), regime=regime)
        assert_names(refusal(splits_of, run), run, "--val-from test")
        assert splits_of(run, "test")

    def test_a_backbone_of_the_same_split_is_accepted(self, plain, tmp_path):
        run = tiny_run(tmp_path / "run", TASK, backbone=str(plain), regime="frozen")
        assert_names(splits_of(run).origin, "train")

    def test_a_backbone_of_a_backbone_of_another_split_is_refused(self, plain, tmp_path):
        """What the first backbone has seen still counts."""
        first = tiny_run(tmp_path / "a", TASK, split_seed=1, backbone=str(plain), regime="mixed")
        run = tiny_run(tmp_path / "b", TASK, split_seed=1, backbone=str(first), regime="frozen")
        assert "--val-from test" in refusal(splits_of, run)


class TestRecords:
    @pytest.fixture
    def recorded(self, monkeypatch) -> list[str]:
        """The splits that were recorded, one after the other."""
        splits, record = [], trained.record

        def noted(network, batches, count, info, *rest):
            splits.append(info.split)
            return record(network, batches, count, info, *rest)

        monkeypatch.setattr(trained, "record", noted)
        return splits

    def test_they_are_reused_if_weights_and_images_are_the_same(self, copy, recorded):
        splits_of(copy)
        splits_of(copy, "test", 1)
        assert recorded == []

    def test_they_are_made_again_if_the_weights_changed(self, copy, recorded):
        state = checkpoint.load(copy)
        state["network"]["backbone.linear.weight"].zero_()
        checkpoint.save(copy, state)
        splits = splits_of(copy)
        assert sorted(recorded) == ["test", "val"]
        logits = splits.test.exit_logits(2)
        bias = state["network"]["backbone.linear.bias"].expand_as(logits)
        assert_close(logits, bias, terms=64)

    def test_they_are_made_again_if_one_is_damaged(self, copy, recorded, caplog):
        before = splits_of(copy).val
        (copy / "records" / "val-off" / "logits.npy").write_bytes(b"torn")
        with caplog.at_level(logging.WARNING):
            after = splits_of(copy).val
        assert recorded == ["val"]
        assert (len(after), after.info) == (len(before), before.info)
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert_names(warning, copy / "records" / "val-off")

    def test_another_precision_has_records_of_its_own(self, copy, recorded):
        require_precision("bf16")
        bf16 = {"run": {**CPU["run"], "amp": "bf16"}}
        get_splits(load_run(copy, TASK, bf16), "train", 0)
        assert sorted(recorded) == ["test", "val"]
        assert {path.name for path in (copy / "records").iterdir() if path.is_dir()} == {
            "val-off",
            "test-off",
            "val-bf16",
            "test-bf16",
        }

    def test_another_runtime_has_records_of_its_own(self, copy, recorded):
        """They are named after it, and so is the record itself."""
        loaded = load_run(copy, TASK, CPU)
        other = dataclasses.replace(loaded.runtime.runtime, name="engine-bf16", precision="bf16")
        network = RuntimeNetwork(loaded.network, other, loaded.runtime.example)
        found = get_record(dataclasses.replace(loaded, runtime=network), "val")
        assert recorded == ["val"]
        assert (found.info.runtime, found.info.precision) == ("engine-bf16", "bf16")
        assert (copy / "records" / "val-engine-bf16").is_dir()
        ours = get_record(loaded, "val").info  # reused
        assert (ours.runtime, ours.precision) == ("torch", "off")
        assert recorded == ["val"]

    def test_one_of_integers_is_made_again_if_train_changed(self, copy, recorded):
        """From its images the ranges of values come."""
        loaded = load_run(copy, TASK, CPU)
        network = RuntimeNetwork(loaded.network, Engine(), loaded.runtime.example)
        loaded = dataclasses.replace(loaded, runtime=network)
        found = get_record(loaded, "val").info.calibration
        assert found == calibration_of(loaded.data) and get_record(loaded, "test")
        assert recorded == ["val", "test"]
        assert get_record(loaded, "val").info.calibration == found  # reused
        train = loaded.data.splits["train"].subset(np.arange(40))
        data = dataclasses.replace(loaded.data, splits={**loaded.data.splits, "train": train})
        loaded = dataclasses.replace(loaded, data=data)
        assert get_record(loaded, "val").info.calibration == calibration_of(data) != found
        assert recorded == ["val", "test", "val"]

    def test_one_of_before_there_were_runtimes_is_reused(self, copy, recorded):
        """What is stored in a record's info has grown."""
        for path in (copy / "records").glob("*/info.json"):
            values = json.loads(path.read_text())
            for name in ("runtime", "calibration", "preparation", "packages"):
                del values[name]
            path.write_text(json.dumps(values))
        splits_of(copy)
        assert recorded == []

    def test_they_are_made_again_with_another_version_of_a_package(self, copy, recorded, caplog):
        path = copy / "records" / "val-off" / "info.json"
        values = json.loads(path.read_text())
        ours = values["packages"]
        assert {name.split()[0] for name in ours} == {"torch", "torchvision", "pillow"}
        values["packages"] = [name if "vision" in name else f"{name}0" for name in ours]
        path.write_text(json.dumps(values))
        with caplog.at_level(logging.INFO):
            assert list(splits_of(copy).val.info.packages) == ours
        assert recorded == ["val"]
        torch_now = next(name for name in ours if name.startswith("torch "))
        told = [r.getMessage() for r in caplog.records if "made with" in r.getMessage()]
        assert_names(*told, f"made with {torch_now}0, pillow", torch_now)
        assert "torchvision" not in told[0]

    def test_two_evaluations_at_once_record_once(self, copy, recorded):
        """The second waits for the first, and finds its record."""
        shutil.rmtree(copy / "records")
        runs = [load_run(copy, TASK, CPU) for _ in range(2)]
        with ThreadPoolExecutor() as pool:
            one, two = pool.map(lambda each: get_record(each, "val"), runs)
        assert np.array_equal(one.logits, two.logits)
        assert recorded == ["val"]


def test_a_run_that_is_not_finished_is_loaded_and_its_weights_are_named(run, tmp_path, caplog):
    shutil.copy(run / checkpoint.PREVIOUS, tmp_path / checkpoint.NAME)
    with caplog.at_level(logging.WARNING):
        weights = load_network(tmp_path, TASK, CPU).weights
    assert_names(weights, 1, 2, "joint")  # the epoch, of how many, and the phase
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert_names(warning, 1, 2, "joint")


def test_data_with_other_val_images_are_refused(run):
    other = Task(tiny_network, lambda settings: few_digits(1))
    hashes = [few_digits(seed).val_hash for seed in (0, 1)]
    assert_names(refusal(load_run, run, other, CPU), run, *hashes)


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError) as caught:
            load_network(directory, TASK, {})
        assert_names(str(caught.value), directory)


class TestRuntime:
    """In which runtime a run is loaded, if none is named: torch, in the settings' precision."""

    @pytest.mark.parametrize(
        ("amp", "name", "precision"), [("off", "torch", "f32"), ("bf16", "torch-bf16", "bf16")]
    )
    def test_torch_is_the_default(self, run, amp, name, precision):
        loaded = load_run(run, TASK, {"run": {**CPU["run"], "amp": amp}})
        runtime = loaded.runtime.runtime
        assert (runtime.name, runtime.precision) == (name, precision)
        assert loaded.runtime.network is loaded.network

    @pytest.mark.parametrize(
        ("device", "runtimes", "expected"),
        [
            (None, ["onnxruntime", "openvino-bf16"], "cpu"),
            ("auto", ["onnxruntime"], "cpu"),
            ("cuda", ["onnxruntime"], "cuda"),  # refused, because it was asked for
            ("auto", ["onnxruntime", "torch"], "auto"),
            ("auto", [None], "auto"),
        ],
    )
    def test_the_device_of_those_that_have_one_is_that(self, device, runtimes, expected):
        given = {} if device is None else {"run": {"device": device, "threads": 3}}
        found = trained.on_their_device(given, runtimes)["run"]
        assert found == {**given.get("run", {}), "device": expected}

    def test_a_gpu_is_not_used_where_the_runtime_has_none(self, run, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(trained, "find_runtime", lambda *_: Engine())
        assert load_run(run, TASK, {}, runtime="onnxruntime").device == torch.device("cpu")

    def test_integers_are_calibrated_on_images_of_several_classes(self, run, monkeypatch):
        """Also where images are in order of their classes, as in class folders."""
        loaded = load_run(run, TASK, CPU)
        train = loaded.data.splits["train"]
        train = train.subset(train.targets.numpy().argsort(kind="stable"))
        data = dataclasses.replace(loaded.data, splits={**loaded.data.splits, "train": train})
        monkeypatch.setattr(trained, "choose_runtime", lambda *_: Engine())
        monkeypatch.setattr(trained, "CALIBRATION", 12)
        example = trained.in_runtime(loaded, data).example
        ((images, targets),) = data.eval_batches("train", len(train))
        same = (example[:, None] == images).flatten(2).all(dim=2)
        assert len(example) == 12 and same.any(dim=1).all()  # prepared as val is
        assert len({int(targets[rows].max()) for rows in same}) > 3

    def test_tracing_reads_no_image(self, run, monkeypatch):
        monkeypatch.setattr(
            type(few_digits(0)), "eval_batches", lambda *_: pytest.fail("an image was read")
        )
        example = load_run(run, TASK, CPU).runtime.example
        assert example.shape == (2, 3, 16, 16)


def test_it_has_the_exits_that_it_was_trained_with(copy):
    """Although its settings leave them to the default, which is another one."""
    state = checkpoint.load(copy)
    names = state["exit_names"]
    state["config"]["model"]["exits"] = None
    checkpoint.save(copy, {name: value for name, value in state.items() if name != "format"})
    assert list(load_network(copy, TASK, CPU).network.exit_names) == names
    default = TASK.build_network(load_network(copy, TASK, CPU).config, 10)
    assert list(default.exit_names) != names


def test_the_reported_weights_are_loaded(copy):
    """The running average, if there is one."""
    state = checkpoint.load(copy)
    state["average"] = {name: value + 1 for name, value in state["network"].items()}
    state["averaged"] = True
    checkpoint.save(copy, state)
    loaded = load_network(copy, TASK, CPU).network.state_dict()
    name = "backbone.linear.bias"
    assert torch.equal(loaded[name], state["network"][name] + 1)


def test_an_evaluation_that_was_being_replaced_is_found_again(evaluated_copy):
    """A process was killed after it had renamed the old one. What begins with a dot is none."""
    before = evaluations(evaluated_copy, "policy.yaml")
    (evaluated_copy / "eval" / "mine").rename(evaluated_copy / "eval" / ".mine.old")
    for name in (".mine.partial", ".other.deleted", ".nfs0001"):
        (evaluated_copy / "eval" / name).mkdir()
        (evaluated_copy / "eval" / name / "policy.yaml").touch()
    assert evaluations(evaluated_copy, "policy.yaml") == before
    (evaluated_copy / "eval" / "mine").rename(evaluated_copy / "eval" / ".mine.old")
    assert find_evaluation(evaluated_copy / "eval" / "mine").name == "mine"
