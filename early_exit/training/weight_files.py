"""Files of weights: read without running anything in them, or named for what they are instead.

Those in the format of safetensors are written here too.
"""

import errno
import json
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from early_exit.errors import UserError
from early_exit.system.disk_errors import kind_of
from early_exit.system.failures import explain_machine

SAVE = "torch.save(model.state_dict(), FILE)"
EXPECTED = "expected a file of torch.save or of safetensors"
# How files of other kinds begin, what they are, and what to do.
SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer without the file's content; run git lfs pull"),
    (b"<", "a web page or XML, probably an error message that was downloaded; download it again"),
    (b"\x1f\x8b", "compressed with gzip; unpack it with gunzip"),
    (b"BZh", "compressed with bzip2; unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed with xz; unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it with unzstd"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x89HDF", f"an HDF5 file, as Keras writes; convert it and save it with {SAVE}"),
    (b"\x93NUMPY", f"a NumPy array; convert it and save it with {SAVE}"),
)
TEXT = {*b"\t\n\r", *range(32, 256)} - {0x80}  # 0x80 begins a pickle
# What weights are made of: everything that the second reader of pickles calls.
PARTS: dict[str, Callable] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": defaultdict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    "torch._utils._rebuild_parameter": lambda data, *_others: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_others: data,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    # of a subclass of tensors or of one with attributes: the tensor itself
    "torch._tensor._rebuild_from_type_v2": lambda build, _type, parts, _attributes: build(*parts),
}
SAFETENSORS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

METADATA = {"__metadata__": {"format": "pt"}}  # which other readers of the format ask for


class Blank:
    """Stands for an object that is not weights. It keeps nothing and runs nothing."""

    name = "an object"
    dump_patches = False  # torch asks a module's class

    def __new__(cls, *_args: object, **_options: object) -> "Blank":
        """A blank, whatever the object's class takes."""
        return super().__new__(cls)

    def __init__(self, *_args: object, **_options: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...

    def __setitem__(self, _key: object, _value: object) -> None: ...

    def __call__(self, *_args: object, **_options: object) -> "Blank":
        """Itself."""
        return self

    def append(self, _value: object) -> None:
        """Keeps nothing."""

    def extend(self, _values: object) -> None:
        """Keeps nothing."""

    add = append


class _Unpickler(pickle.Unpickler):
    """Builds tensors; every other class or function of the file is a `Blank`.

    A file may set attributes of what it is given. Therefore it is given no class or function of
    this process, only stand-ins of its own.
    """

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name == "torch.storage.UntypedStorage":  # torch asks it for nothing else
            return SimpleNamespace(dtype=torch.uint8)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if build := PARTS.get(full_name):
            return type("Part", (Blank,), {"__new__": lambda _part, *values: build(*values)})
        return type("Blank", (Blank,), {"name": full_name})


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def read(path: Path, blanks: bool = False) -> Any:
    """What a file of weights holds, on the CPU.

    blanks: read other objects in it, such as the arguments of a script, as `Blank`; else a file
    that has any is refused. Nothing in the file is run. Raises UserError if the file cannot be
    read, Unavailable if that may pass; the message names its kind, if that is known.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if head[5:9] == b"\0\0\0{":  # a length, then JSON
            return _read_safetensors(path)
        _check_kind(path, head)
        with warnings.catch_warnings():  # such as about the protocol of the pickle
            warnings.simplefilter("ignore")
            return _read_torch(path, blanks)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint at {path}; check the path") from None
    except OSError as error:
        # EINVAL: a position outside the file, as where its middle is missing
        kind = UserError if error.errno in (None, errno.EINVAL) else kind_of(error)
        raise kind(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch may raise anything on a file of another kind
        if lacking := explain_machine(error):  # such as no memory
            raise lacking from None
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is incomplete, damaged or of another kind;"
            f" {EXPECTED}"
        ) from None


def _read_torch(path: Path, blanks: bool) -> Any:
    """What `torch.load` returns."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not blanks:
            raise UserError(
                f"{path} does not hold only weights: it is damaged, not a checkpoint, or holds"
                " other objects, which are not loaded for safety"
            ) from None
    reader = SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="weights")
    return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)


def _check_kind(path: Path, head: bytes) -> None:
    """Raises UserError for a file that is not of torch or safetensors, or is cut off.

    head: its first bytes.
    """
    kind = next((kind for start, kind in SIGNATURES if head.lstrip().startswith(start)), "")
    if not head:
        kind = "empty; download or copy it again"
    elif head.startswith(b"PK\x03\x04"):
        whole = zipfile.is_zipfile(path)
        kind = _kind_of_zip(path) if whole else "incomplete: its end is missing; copy it again"
    elif not kind and not head.startswith(b"\x80") and tarfile.is_tarfile(path):
        kind = _kind_of_tar(path)
    elif not kind and all(byte in TEXT for byte in head):
        kind = f"a text file; {EXPECTED}"
    if kind:
        raise UserError(f"{path} cannot be read as a checkpoint: it is {kind}")


def _kind_of_zip(path: Path) -> str:
    """What a ZIP archive is; empty for one of `torch.save` that is whole."""
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return f"a TorchScript archive; load it with torch.jit.load, then {SAVE}"
        if "data.pkl" not in names:
            first = ", ".join(archive.namelist()[:3]) or "nothing"
            return f"a ZIP archive ({first}), not one that torch.save wrote; unpack it"
        # torch does not verify checksums, and can be told to write none, which are 0 then
        has_checksums = any(part.CRC for part in archive.infolist() if part.file_size)
        damaged = archive.testzip() if has_checksums else None
    return f"damaged: its part {damaged} fails its checksum; copy it again" if damaged else ""


def _kind_of_tar(path: Path) -> str:
    with tarfile.open(path) as archive:
        first = [member.name for member in archive][:4]
    if not first:  # zeros
        return "blank, as after a copy that failed; copy it again"
    if {"pickle", "storages", "tensors"} <= set(first):
        return f"in a format of 2017; load it with an older torch and save it with {SAVE}"
    return f"a tar archive ({', '.join(first[:3])}); unpack it"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in the format of https://github.com/huggingface/safetensors: the length
    of the header, the header in JSON, and all values."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start].decode())
    header.pop("__metadata__", None)
    values, tensors = torch.frombuffer(content, dtype=torch.uint8)[start:], {}
    for name, entry in header.items():
        dtype, shape = SAFETENSORS.get(entry["dtype"]), entry["shape"]
        if dtype is None:
            raise UserError(f"{path} holds {name} as {entry['dtype']}; convert it to F32")
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(values):
            raise ValueError("cut off")
        # clone: aligned; a wrong number of values does not fit the shape
        tensors[name] = values[begin:end].clone().view(dtype).reshape(shape)
    return tensors


def safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a file in the format of safetensors, which `read` reads.

    The header lists the tensors in their order. Their values begin with those of the widest type,
    so that all are aligned, as other readers need. Raises UserError for a type that the format has
    not.
    """
    names, values = {dtype: name for name, dtype in SAFETENSORS.items()}, []
    offsets, end = {}, 0
    for name, value in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        if value.dtype not in names:
            raise UserError(f"{name} is of {value.dtype}, which safetensors files cannot hold")
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets[name], end = [end, end + len(raw)], end + len(raw)
        values.append(raw)
    header = METADATA | {
        name: {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": offsets[name],
        }
        for name, value in tensors.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *values))
