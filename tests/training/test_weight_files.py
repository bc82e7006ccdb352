"""Files of weights: safetensors read as they are, and files of other kinds named."""

import argparse
import gzip
import importlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from helpers import assert_names, refusal
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from early_exit.training import weight_files
from early_exit.training.weight_files import SAFETENSORS


def safetensors(header: dict, values: bytes, padding: str = "") -> bytes:
    """A file in that format."""
    text = (json.dumps(header) + padding).encode()
    return struct.pack("<Q", len(text)) + text + values


def two_tensors() -> bytes:
    """Two of them: 1, 2, 3 in float32 and -1 in int64, not aligned to its size."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]},
        "b": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
    }
    return safetensors(header, struct.pack("<fffq", 1, 2, 3, -1), "   ")


@pytest.fixture
def path(tmp_path):
    """Where the file is."""
    return tmp_path / "file.pth"


class TestSafetensors:
    @pytest.mark.parametrize("name", ["file.safetensors", "file.bin"])
    def test_by_hand(self, tmp_path, name):
        (tmp_path / name).write_bytes(two_tensors())
        found = weight_files.read(tmp_path / name)
        assert list(found) == ["a", "b"]
        assert torch.equal(found["a"], torch.tensor([[1.0], [2.0], [3.0]]))
        assert torch.equal(found["b"], torch.tensor(-1))

    @pytest.mark.parametrize("dtype", SAFETENSORS)
    def test_every_type(self, path, dtype):
        value = torch.tensor([[0, 1], [1, 1]]).to(SAFETENSORS[dtype])
        raw = value.view(torch.uint8).numpy().tobytes()
        entry = {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, len(raw)]}
        path.write_bytes(safetensors({"w": entry}, raw))
        (found,) = weight_files.read(path).values()
        assert found.dtype == value.dtype and torch.equal(found, value)

    @pytest.mark.parametrize("cut", [9, 20, -1])
    def test_cut_off(self, path, cut):
        path.write_bytes(two_tensors()[:cut])
        assert_names(refusal(weight_files.read, path), path)

    def test_a_tensor_without_values(self, path):
        entry = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
        path.write_bytes(safetensors({"w": entry}, b""))
        (found,) = weight_files.read(path).values()
        assert found.shape == (0, 3)

    def test_a_type_that_torch_cannot_train(self, path):
        entry = {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}
        path.write_bytes(safetensors({"w": entry}, b"0"))
        assert_names(refusal(weight_files.read, path), path, "F8_E4M3")

    @given(content=st.binary(max_size=40))
    def test_any_header_ends_in_one_line(self, tmp_path_factory, content):
        path = tmp_path_factory.mktemp("bytes") / "file"
        path.write_bytes(struct.pack("<Q", len(content)) + b"{" + content)
        assert str(path) in refusal(weight_files.read, path)


def archive(*names: str) -> bytes:
    """A ZIP archive with these names."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name in names:
            file.writestr(name, "content")
    return content.getvalue()


def tar(*names: str) -> bytes:
    """A tar archive with these names, each of a whole ZIP archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(archive("a"))
            file.addfile(entry, io.BytesIO(archive("a")))
    return content.getvalue()


def array() -> bytes:
    """numpy's archive of an array."""
    content = io.BytesIO()
    np.savez(content, weight=np.zeros(3))
    return content.getvalue()


KINDS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7\n", "git lfs"),
    "page": (b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
    "gzip": (gzip.compress(b"content" * 99), "gunzip"),
    "bzip2": (b"BZh91AY&SY", "bunzip2"),
    "xz": (b"\xfd7zXZ\x00\x00", "unxz"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "empty": (b"", "empty"),
    "text": (b'{"weight_map": {}}', "text"),
    "zip": (archive("resnet.pth"), "ZIP"),
    "npz": (array(), "weight.npy"),
    "script": (archive("net/data.pkl", "net/constants.pkl"), "torch.jit.load"),
    "tar": (tar("resnet.pth"), "tar"),
    "old": (tar("sys_info", "pickle", "tensors", "storages"), "older torch"),
    "cut": (archive("net/data.pkl")[:-10], "incomplete"),
    "zeros": (bytes(4096), "blank"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blanks", [False, True])
def test_what_a_file_is_instead(path, kind, blanks):
    content, named = KINDS[kind]
    path.write_bytes(content)
    assert_names(refusal(weight_files.read, path, blanks), path, named)


def test_a_file_that_may_not_be_read(path, monkeypatch):
    path.write_bytes(b"PK")
    monkeypatch.setattr(
        type(path), "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no"))
    )
    assert_names(refusal(weight_files.read, path), path, "no")


@pytest.mark.parametrize("legacy", [False, True])
def test_blanks_are_only_made_where_asked_for(path, legacy):
    content = {"net": nn.Linear(1, 1).state_dict(), "net2": nn.Linear(1, 1)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_names(refusal(weight_files.read, path), path)
    found = weight_files.read(path, blanks=True)
    assert torch.equal(found["net"]["weight"], content["net"]["weight"])
    assert isinstance(found["net2"], weight_files.Blank)


def test_tensors_with_attributes_beside_other_objects(path):
    value = torch.ones(2)
    value.origin = "elsewhere"
    trained = nn.Parameter(torch.ones(3))
    trained.rank = 1
    byte = torch.zeros(1).to(torch.float8_e4m3fn)
    content = {"a": value, "b": trained, "c": byte, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, path)
    found = weight_files.read(path, blanks=True)
    assert torch.equal(found["a"], value) and torch.equal(found["b"], trained)
    assert found["c"].dtype == byte.dtype


class Calls:
    """An object that calls a function where it is unpickled."""

    def __init__(self, function, *values):
        self.call = function, values

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_no_function_of_a_file_is_called(path, protocol):
    made = path.with_name("made")
    calls = {
        "open": Calls(open, str(made), "w"),
        "eval": Calls(eval, f"open({str(made)!r}, 'w')"),
        "system": Calls(os.system, f"touch {made}"),
        "load": Calls(torch.load, str(path)),
    }
    torch.save({"net": {"weight": torch.ones(2)}, **calls}, path, pickle_protocol=protocol)
    found = weight_files.read(path, blanks=True)
    assert torch.equal(found["net"]["weight"], torch.ones(2)) and not made.exists()


def word(text: str) -> bytes:
    """A string in a pickle."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


@pytest.mark.parametrize(
    "name",
    [
        "torch.storage UntypedStorage",
        "torch._utils _rebuild_tensor_v2",
        "torch.nn.parameter Parameter",
    ],
)
def test_a_file_changes_nothing_in_this_process(path, name):
    # torch writes a file called CLASS.__name__ if CLASS.dump_patches and its source has changed
    made = path.with_name("made")
    module, _, part = name.partition(" ")
    found = b"c" + name.replace(" ", "\n").encode() + b"\n"
    attributes = word("dump_patches") + b"\x88" + word("__name__") + word(str(made))
    changed = found + b"N}(" + attributes + b"u\x86b0"
    persistent = b"(" + word("module") + found + word("net.py") + word("import os") + b"tQ0"
    other_object = b"cargparse\nNamespace\n0"
    with path.open("wb") as file:
        for part_of_file in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}):
            pickle.dump(part_of_file, file, protocol=2)
        file.write(b"\x80\x02" + other_object + changed + persistent + b"}.")
        pickle.dump([], file, protocol=2)
    refusal(weight_files.read, path, blanks=True)
    assert list(path.parent.iterdir()) == [path]
    assert getattr(importlib.import_module(module), part).__name__ == part
