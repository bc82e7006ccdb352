"""Packages of the runtimes: a missing one ends in one line with the command that installs it."""

import configparser
import importlib
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, assert_names
from torch import nn

from early_exit.errors import UserError
from early_exit.inference.runtimes import onnx_export
from early_exit.inference.runtimes.base import Example
from early_exit.inference.runtimes.onnxruntime import OnnxRuntime
from early_exit.inference.runtimes.openvino import OpenVINORuntime
from early_exit.inference.runtimes.packages import EXTRAS, import_package
from early_exit.inference.runtimes.quantise import quantise_for_openvino
from early_exit.inference.segments import Segment
from early_exit.model.network import Stage


@pytest.fixture
def absent(monkeypatch):
    """A function that makes a package, and every module in it, impossible to import."""

    def remove(package):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)  # import then raises ImportError

    return remove


def needs(package, call):
    """That a call ends in one line which names the package and the command."""
    with pytest.raises(UserError) as caught:
        call()
    name = package.replace("_", "-")
    assert_names(str(caught.value), package, f"pip install {name}", EXTRAS[package])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_package_is_named_with_its_extra(absent, package):
    absent(package)
    needs(package, lambda: import_package(package))
    needs(package, lambda: import_package(f"{package}.part"))


def test_a_broken_package_says_why_in_one_line(monkeypatch):
    def fail(name):
        raise ImportError("libgomp.so.1:\n  cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    needs("onnxruntime", lambda: import_package("onnxruntime"))
    with pytest.raises(UserError, match=r"libgomp.so.1: cannot open"):
        import_package("onnxruntime")


def test_onnxruntime_writes_nothing_into_the_home_directory(tmp_path):
    """In an environment of its own, because on machines of continuous integration ONNX Runtime has
    no telemetry."""
    pytest.importorskip("onnxruntime")
    code = (
        f"import sys; sys.path[:0] = {sys.path}\n"
        "from early_exit.inference.runtimes.table import find_runtime\n"
        "find_runtime('onnxruntime')\n"
        "assert 'onnxruntime' in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, env={"HOME": str(tmp_path)}
    )
    assert list(tmp_path.iterdir()) == []


def test_telemetry_that_the_user_wants_stays_on(monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    import_package("json")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"


def test_runtimes_need_their_package(absent):
    absent("onnxruntime")
    needs("onnxruntime", lambda: OnnxRuntime().load(b""))
    absent("openvino")
    needs("openvino", lambda: OpenVINORuntime().load(b""))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_exporting_needs_its_packages(absent, package):
    absent(package)
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(2, 3, 2, 2)
    segment = Segment((Stage([network], None).eval(),), "max_prob", is_first=True)
    needs(package, lambda: onnx_export.export_segment(segment, Example(images)))
    needs(package, lambda: onnx_export.export_network(network, images))


def test_integers_in_openvino_need_nncf(absent):
    absent("nncf")
    needs("nncf", lambda: quantise_for_openvino(b"", Example(torch.zeros(2, 3, 2, 2))))


def test_extras_install_what_they_are_named_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    for package, extra in EXTRAS.items():
        requirement = f"\n{package.replace('_', '-')}>="
        assert requirement in extras[extra] and requirement in extras["test"]
