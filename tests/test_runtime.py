"""The machine: device, precision, versions, signals, seeds."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess

import pytest
import torch
from scripts import refusal

from early_exit import runtime

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestDevice:
    @pytest.mark.parametrize(("there", "expected"), [(False, "cpu"), (True, "cuda")])
    def test_auto_is_the_gpu_where_there_is_one(self, monkeypatch, there, expected):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
        assert runtime.choose_device("auto") == torch.device(expected)

    def test_each_of_several_processes_has_a_gpu_of_its_own(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_RANK", "2")
        assert runtime.choose_device("auto") == torch.device("cuda", 2)
        assert "cuda:1" in refusal(runtime.choose_device, "cuda:1")
        monkeypatch.setenv("LOCAL_RANK", "4")
        assert re.search(r"cuda:4\b.*\b4 GPUs", refusal(runtime.choose_device, "cuda"))

    def test_cpu(self):
        assert runtime.choose_device("cpu") == CPU

    def test_no_such_device(self):
        message = refusal(runtime.choose_device, "gpu")
        assert "'gpu'" in message and "cpu" in message and "cuda" in message

    @pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:1", 1), ("cuda:5", 2)])
    def test_a_gpu_that_is_not_there(self, monkeypatch, name, count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        message = refusal(runtime.choose_device, name)
        assert re.search(rf"{name}\b.*\b{count} GPUs?\b", message)

    def test_a_gpu_that_is_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert runtime.choose_device("cuda:1") == torch.device("cuda", 1)


class TestPrecision:
    @pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
    @pytest.mark.parametrize("device", [CPU, CUDA])
    def test_what_is_named_is_kept(self, amp, device):
        assert runtime.choose_precision(amp, device) == amp

    @pytest.mark.parametrize(
        ("avx512", "amx", "expected"),
        [(False, False, "off"), (True, False, "bf16"), (False, True, "bf16")],
    )
    def test_auto_on_a_processor(self, monkeypatch, avx512, amx, expected):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        assert runtime.choose_precision("auto", CPU) == expected

    def test_auto_on_a_torch_that_cannot_tell(self, monkeypatch):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.delattr(torch.cpu, name, raising=False)
        assert runtime.choose_precision("auto", CPU) == "off"

    @pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "off")])
    def test_auto_on_a_gpu(self, monkeypatch, native, expected):
        def is_bf16_supported(including_emulation=True):
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        assert runtime.choose_precision("auto", CUDA) == expected

    @pytest.mark.parametrize(("precision", "dtype"), [("off", torch.float32),
                                                      ("bf16", torch.bfloat16)])
    def test_autocast_computes_in_it(self, precision, dtype):
        with runtime.autocast(precision, CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


class TestVersions:
    @pytest.fixture
    def installed(self, monkeypatch):
        """A function that pretends a version of torch, and of what torchvision needs."""

        def pretend(torch_version: str, needs: list[str] | None):
            found = {"torch": torch_version, "torchvision": "0.29.2"}
            monkeypatch.setattr(importlib.metadata, "version", found.__getitem__)
            monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
            monkeypatch.setattr(importlib, "import_module", lambda name: None)

        return pretend

    @pytest.mark.parametrize(
        ("version", "needs"),
        [
            ("2.15.0", ["numpy", "torch==2.15.0"]),
            ("2.15.0+cpu", ["torch==2.15.0"]),
            ("2.15.1", ["torch>=2.15"]),
            ("2.15.0", ["torch (==2.15.0)"]),
            ("2.15.0", ["numpy"]),
            ("2.15.0", None),
        ],
    )
    def test_a_pair_that_fits_passes(self, installed, version, needs):
        installed(version, needs)
        assert runtime.check_torchvision() is None

    @pytest.mark.parametrize("need", ["torch==2.14.1", "torch>=2.16", "torch (==2.9.0)"])
    def test_a_pair_that_does_not_fit_is_one_sentence(self, installed, need):
        installed("2.15.0", ["numpy", need])
        said = refusal(runtime.check_torchvision)
        assert all(word in said for word in ("torch 2.15.0", "torchvision 0.29.2", need))
        assert "pip install" in said

    def test_a_torchvision_that_cannot_be_imported_is_one_sentence(self, installed, monkeypatch):
        installed("2.15.0", ["torch==2.15.0"])

        def broken(name):
            raise RuntimeError("operator torchvision::nms does not exist\nmore lines")

        monkeypatch.setattr(importlib, "import_module", broken)
        said = refusal(runtime.check_torchvision)
        assert "torch 2.15.0" in said and "torchvision 0.29.2" in said

    def test_no_torchvision_is_one_sentence(self, monkeypatch):
        version = importlib.metadata.version

        def absent(name):
            if name == "torchvision":
                raise importlib.metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(importlib.metadata, "version", absent)
        said = refusal(runtime.check_torchvision)
        assert "torchvision" in said and "pip install" in said

    def test_the_installed_pair_fits(self):
        runtime.check_torchvision()

    def test_versions_name_what_ran_and_can_be_written_as_json(self):
        found = json.loads(json.dumps(runtime.versions()))
        assert found["torch"] == importlib.metadata.version("torch")
        assert set(found) == {"python", "torch", "torchvision", "numpy", "git"}

    def test_without_git_the_revision_is_unknown(self, monkeypatch):
        def no_git(*_, **__):
            raise FileNotFoundError("git")

        monkeypatch.setattr(subprocess, "run", no_git)
        assert runtime.git_revision.__wrapped__() == "unknown"
        monkeypatch.setenv("EARLY_EXIT_REVISION", "v1-3-gabc")  # as in an image
        assert runtime.git_revision.__wrapped__() == "v1-3-gabc"


class TestLeaving:
    def test_sigterm_is_heard_as_the_first_process_of_a_container_must(self):
        before = signal.getsignal(signal.SIGTERM)
        try:
            runtime.leave_on_sigterm()
            with pytest.raises(runtime.Stopped, match=r"\b15\b") as stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
            assert stopped.value.code == 143
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_nobody_who_expects_mistakes_takes_it_for_one(self):
        with pytest.raises(runtime.Stopped):
            try:
                raise runtime.Stopped("stopped", signal.SIGTERM)
            except Exception:
                pass


class TestStopSignals:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_where_it_is_told_to_heed_the_first_one_breaks_off(self, signum):
        with runtime.StopSignals() as stop:
            stop.heed()
            with pytest.raises(runtime.Interrupted):
                os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signum

    def test_one_that_came_before_is_heeded_too(self):
        with runtime.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(runtime.Interrupted):
                stop.heed()

    def test_it_breaks_off_no_longer(self):
        with runtime.StopSignals() as stop:
            stop.heed()
            stop.at_once = False
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_is_noted_and_the_program_goes_on(self, signum):
        with runtime.StopSignals() as stop:
            assert stop.signum is None
            os.kill(os.getpid(), signum)
            assert stop.signum == signum

    def test_a_second_signal_changes_nothing(self):
        with runtime.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGTERM

    def test_the_handlers_before_are_put_back(self):
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        with runtime.StopSignals():
            assert signal.getsignal(signal.SIGTERM) is not before[0]
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before

    def test_the_handlers_before_are_put_back_after_an_error(self):
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(ZeroDivisionError), runtime.StopSignals():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGINT) is before

    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_exit_code_of_a_stop(self, signum, code):
        assert runtime.Stopped("stopped", signum).code == code


class TestSeeds:
    @pytest.fixture(autouse=True)
    def settings_put_back(self):
        before = torch.are_deterministic_algorithms_enabled()
        yield
        torch.use_deterministic_algorithms(before)

    def test_the_same_seed_draws_the_same(self):
        draws = []
        for _ in range(2):
            runtime.seed_everything(3)
            draws.append(torch.rand(5))
        assert torch.equal(*draws)

    def test_another_seed_draws_another(self):
        runtime.seed_everything(3)
        first = torch.rand(5)
        runtime.seed_everything(4)
        assert not torch.equal(first, torch.rand(5))

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_deterministic_algorithms_are_switched(self, monkeypatch, deterministic):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        runtime.seed_everything(0, deterministic)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
