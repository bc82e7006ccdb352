"""The runtimes by name: what is built, and what is refused."""

import shutil
import subprocess
import sys

import pytest
import torch
from helpers import assert_names

from early_exit.errors import UserError
from early_exit.inference.runtimes.compiled import CompiledRuntime
from early_exit.inference.runtimes.cudagraph import CudaGraphRuntime
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.inference.runtimes.onnxruntime import OnnxRuntime
from early_exit.inference.runtimes.openvino import OpenVINORuntime
from early_exit.inference.runtimes.packages import EXTRAS
from early_exit.inference.runtimes.table import (
    DEPLOYABLE,
    INTEGERS,
    NEEDED_TO_BUILD,
    RUNTIMES,
    available_runtimes,
    find_runtime,
    split_name,
)

KINDS = {
    "torch": EagerRuntime,
    "compile": CompiledRuntime,
    "cudagraph": CudaGraphRuntime,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINORuntime,
}


@pytest.fixture
def everything(monkeypatch):
    """All packages, a compiler and a GPU, as far as can be asked."""
    for package in ("onnxruntime", "onnxscript", "openvino", "nncf"):
        monkeypatch.setitem(sys.modules, package, sys)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def missing(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)


def message(name, device="cpu"):
    with pytest.raises(UserError) as caught:
        find_runtime(name, device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("name", RUNTIMES)
def test_every_name_is_built_in_its_precision(name):
    kind, _, precision = name.partition("-")
    runtime = find_runtime(name, "cuda" if kind == "cudagraph" else "cpu")
    assert type(runtime) is KINDS[kind]
    assert (runtime.name, runtime.precision) == (name, precision or "f32")


@pytest.mark.usefixtures("everything")
def test_device_and_threads_reach_the_runtime():
    assert find_runtime("torch-fp16", "cuda:1").device == torch.device("cuda", 1)
    assert find_runtime("openvino", threads=3).threads == 3
    assert find_runtime("onnxruntime").threads is None


def test_an_unknown_name_gets_the_nearest_one_and_the_list():
    said = message("openvino-bf61")
    assert "did you mean openvino-bf16?" in said
    assert_names(said, "openvino-bf61", *RUNTIMES)


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_a_missing_package_gets_the_command_that_installs_it(monkeypatch, package):
    missing(monkeypatch, package)
    assert f"pip install {package}" in message(package)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("name", ["onnxruntime", "openvino-bf16"])
def test_a_runtime_of_the_cpu_refuses_a_gpu(name):
    assert_names(message(name, "cuda:0"), name, "cuda:0")


def test_cuda_graphs_need_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_names(message("cudagraph"), "cudagraph", "cpu")
    assert_names(message("cudagraph-bf16", "cuda"), "cudagraph-bf16", "cuda")


def test_compiling_for_the_cpu_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing(monkeypatch, "openvino")  # takes seconds to import
    assert_names(message("compile"), "no-such-compiler")
    assert "compile" not in available_runtimes("cpu")


class TestAvailable:
    @pytest.mark.usefixtures("everything")
    @pytest.mark.parametrize(("made_for_bf16", "chosen"), [(True, "bf16"), (False, "off")])
    def test_only_what_the_device_is_made_for(self, monkeypatch, made_for_bf16, chosen):
        monkeypatch.setattr("early_exit.system.device.choose_precision", lambda *_: chosen)
        bf16 = {"torch-bf16", "compile-bf16", "openvino-bf16"} if made_for_bf16 else set()
        on_cpu = {"torch", "compile", "onnxruntime", "onnxruntime-int8", "openvino"}
        assert set(available_runtimes("cpu")) == on_cpu | {"openvino-int8"} | bf16
        kinds = ("torch", "compile", "cudagraph")
        precisions = ("", "-fp16", "-bf16") if made_for_bf16 else ("", "-fp16")
        assert set(available_runtimes("cuda")) == {
            kind + precision for kind in kinds for precision in precisions
        }

    @pytest.mark.usefixtures("everything")
    def test_only_what_is_installed(self, monkeypatch):
        missing(monkeypatch, "onnxruntime")
        missing(monkeypatch, "nncf")
        names = available_runtimes("cpu")
        assert "openvino" in names
        assert not {"onnxruntime", "onnxruntime-int8", "openvino-int8"} & set(names)

    @pytest.mark.usefixtures("everything")
    def test_a_network_is_exported_by_onnxscript(self, monkeypatch):
        missing(monkeypatch, "onnxscript")
        assert not any(name.startswith("o") for name in available_runtimes("cpu"))
        assert find_runtime("openvino").name == "openvino"  # a model that was exported before


def test_a_runtime_of_exported_models_is_found_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnxruntime'] = sys\n"
        "from early_exit.inference.runtimes.table import find_runtime\n"
        "assert find_runtime('onnxruntime').name == 'onnxruntime'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_tables_name_the_same_runtimes():
    """Those of ONNX models are named as their package, and those in integers are among them."""
    for name in DEPLOYABLE:
        package, precision = split_name(name)
        assert name in RUNTIMES and package in EXTRAS
        assert (name in INTEGERS) == (precision == "int8")
    assert set(INTEGERS) <= set(DEPLOYABLE) == set(NEEDED_TO_BUILD)
