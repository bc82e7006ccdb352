"""Checkpoints in the files of model hubs: written and read, damaged and of other programs."""

import hashlib
import json

import pytest
import torch
from helpers import assert_names, refusal

from early_exit.training import checkpoint, exported, weight_files
from early_exit.training.exported import SETTINGS, WEIGHTS


def state(**changed) -> dict:
    """A checkpoint with weights of every kind that networks have."""
    network = {
        "backbone.norm.num_batches_tracked": torch.tensor(7),
        "backbone.conv.weight": torch.linspace(-1, 1, 24)
        .reshape(2, 3, 2, 2)
        .to(memory_format=torch.channels_last),
        "backbone.norm.running_var": torch.tensor([1e6, 1e-9]),
        "heads.layer1.weight": torch.tensor([[1 / 3]]).expand(2, 2),
        "empty": torch.zeros(0, 3),
    }
    return {
        "format": checkpoint.FORMAT,
        "position": {"phase": 1, "epoch": 0, "step": 0},
        "config": {"optim": {"lr": 0.1, "milestones": [0.5, 0.75]}},
        "exit_names": ["layer1", "final"],
        "classes": ["ape", "b\udcffe"],
        "normalisation": {"mean": [1 / 3], "std": [0.1]},
        "val_hash": "hash",
        "unseen_val": None,
        "network": network,
    } | changed


@pytest.fixture
def directory(tmp_path):
    """A directory with the two files."""
    exported.write(tmp_path, state())
    return tmp_path


def test_everything_is_read_as_it_was_written(directory):
    found, expected = checkpoint.load(directory), state()
    weights, values = found.pop("network"), expected.pop("network")
    assert found == expected
    assert list(weights) == list(values)  # the hash of weights depends on the order
    for name, value in weights.items():
        assert value.dtype == values[name].dtype and value.is_contiguous()
        assert torch.equal(value, values[name]), name


def test_the_file_is_as_other_readers_need_it(directory):
    """The length of the header, the header, then values without gaps, each aligned to its type."""
    content = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    begins = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert [begin for begin, _ in begins] == [0, *(end for _, end in begins[:-1])]
    assert begins[-1][1] == len(content) - 8 - length
    for entry in header.values():
        assert entry["data_offsets"][0] % {"I64": 8, "F32": 4}[entry["dtype"]] == 0


def test_rounded_weights_take_two_bytes_and_are_read_in_float32(tmp_path):
    network = checkpoint.reported(state(), "float16")
    exported.write(tmp_path, state(network=network, rounded_to="float16"))
    types = {name: value.dtype for name, value in weight_files.read(tmp_path / WEIGHTS).items()}
    assert types["heads.layer1.weight"] == torch.float16
    assert types["backbone.norm.running_var"] == torch.float32
    found = checkpoint.load(tmp_path)["network"]
    for name, value in network.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_a_type_that_the_format_has_not(tmp_path):
    message = refusal(
        exported.write, tmp_path, state(network={"w": torch.zeros(1, dtype=torch.cfloat)})
    )
    assert_names(message, "w", "torch.complex64")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [WEIGHTS, SETTINGS])
@pytest.mark.parametrize("cut", [0, 5, 20, -1])
def test_a_file_that_is_cut_off(directory, name, cut):
    path = directory / name
    path.write_bytes(path.read_bytes().rstrip()[:cut])
    assert_names(refusal(checkpoint.load, directory), path)


def test_a_changed_value_is_noticed(directory):
    path = directory / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_names(refusal(checkpoint.load, directory), path, directory / SETTINGS)


def test_a_pickle_in_the_place_of_weights_is_not_run(directory, tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "trace"

    class Executed:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    path = directory / WEIGHTS
    torch.save({"w": Executed()}, path)
    settings = json.loads((directory / SETTINGS).read_text())
    settings["sha256"] = {WEIGHTS: hashlib.sha256(path.read_bytes()).hexdigest()}
    (directory / SETTINGS).write_text(json.dumps(settings))
    assert_names(refusal(checkpoint.load, directory), path)
    assert not trace.exists()


def test_weights_without_settings(directory):
    (directory / SETTINGS).unlink()
    assert_names(refusal(checkpoint.load, directory), directory / SETTINGS)


def test_settings_without_weights_are_no_checkpoint(directory):
    (directory / WEIGHTS).unlink()
    assert checkpoint.newest(directory) == (None, None)
    assert_names(refusal(checkpoint.load, directory), directory, WEIGHTS)


@pytest.mark.parametrize(
    "content",
    ['{"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}', "[1]", "null"],
)
def test_settings_of_another_program(directory, content):
    (directory / SETTINGS).write_text(content)
    assert_names(refusal(checkpoint.load, directory), directory / SETTINGS, "--backbone")


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", "early_exit checkpoint 9"), ("rounded_to", "int4"), ("classes", None)],
)
def test_settings_of_another_version(directory, name, value):
    settings = json.loads((directory / SETTINGS).read_text())
    (directory / SETTINGS).write_text(json.dumps({**settings, name: value}))
    assert_names(refusal(checkpoint.load, directory), directory / SETTINGS)


def test_a_run_is_read_from_its_checkpoint_also_beside_such_files(directory):
    checkpoint.save(directory, state(val_hash="newer"))
    assert checkpoint.load(directory)["val_hash"] == "newer"
