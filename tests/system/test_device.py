"""The device, its precision, seeds and threads."""

import re

import pytest
import torch
from helpers import refusal, require_precision

from early_exit.config import RunConfig
from early_exit.inference.runtimes.eager import EagerRuntime
from early_exit.system import device
from early_exit.system.device import (
    autocast_context,
    choose_device,
    choose_precision,
    seed_everything,
    set_up,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestDevice:
    @pytest.mark.parametrize(("there", "expected"), [(False, "cpu"), (True, "cuda")])
    def test_auto_is_the_gpu_where_there_is_one(self, monkeypatch, there, expected):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
        assert choose_device("auto") == torch.device(expected)

    def test_each_of_several_processes_has_a_gpu_of_its_own(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_RANK", "2")
        assert choose_device("auto") == torch.device("cuda", 2)
        assert "cuda:1" in refusal(choose_device, "cuda:1")
        monkeypatch.setenv("LOCAL_RANK", "4")
        assert re.search(r"cuda:4\b.*\b4 GPUs", refusal(choose_device, "cuda"))

    def test_cpu(self):
        assert choose_device("cpu") == CPU

    def test_no_such_device(self):
        message = refusal(choose_device, "gpu")
        assert "'gpu'" in message and "cpu" in message and "cuda" in message

    @pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:1", 1), ("cuda:5", 2)])
    def test_a_gpu_that_is_not_there(self, monkeypatch, name, count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        message = refusal(choose_device, name)
        assert re.search(rf"{name}\b.*\b{count} GPUs?\b", message)

    def test_a_gpu_that_is_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert choose_device("cuda:1") == torch.device("cuda", 1)


class TestPrecision:
    @pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
    @pytest.mark.parametrize("device", [CPU, CUDA])
    def test_a_named_precision_is_used(self, amp, device):
        assert choose_precision(amp, device) == amp

    @pytest.mark.parametrize(
        ("avx512", "amx", "expected"),
        [(False, False, "off"), (True, False, "bf16"), (False, True, "bf16")],
    )
    def test_auto_on_a_processor(self, monkeypatch, avx512, amx, expected):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        assert choose_precision("auto", CPU) == expected

    def test_auto_on_a_torch_that_cannot_tell(self, monkeypatch):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.delattr(torch.cpu, name, raising=False)
        assert choose_precision("auto", CPU) == "off"

    @pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "off")])
    def test_auto_on_a_gpu(self, monkeypatch, native, expected):
        def is_bf16_supported(including_emulation=True):
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        assert choose_precision("auto", CUDA) == expected

    @pytest.mark.parametrize(
        ("precision", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16)]
    )
    def test_autocast_computes_in_it(self, precision, dtype):
        if precision != "off":
            require_precision(precision)
        with autocast_context(precision, CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


class TestSeeds:
    @pytest.fixture(autouse=True)
    def settings_put_back(self):
        before = torch.are_deterministic_algorithms_enabled()
        yield
        torch.use_deterministic_algorithms(before)

    def test_the_same_seed_draws_the_same(self):
        draws = []
        for _ in range(2):
            seed_everything(3)
            draws.append(torch.rand(5))
        assert torch.equal(*draws)

    def test_another_seed_draws_another(self):
        seed_everything(3)
        first = torch.rand(5)
        seed_everything(4)
        assert not torch.equal(first, torch.rand(5))

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_deterministic_algorithms_are_switched(self, monkeypatch, deterministic):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        seed_everything(0, deterministic)
        assert torch.are_deterministic_algorithms_enabled() is deterministic

    def test_set_up_makes_the_gpu_current_by_its_number(self, monkeypatch):
        current = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        for name in ("benchmark", "allow_tf32"):  # put back afterwards
            monkeypatch.setattr(torch.backends.cudnn, name, False)
        assert set_up(RunConfig(amp="off"))[0] == CUDA
        assert current == [0]  # torch refuses the device "cuda", which has none

    def test_a_containers_limit_counts(self, monkeypatch):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            monkeypatch.setattr(device, "processors", lambda: 1)
            set_up(RunConfig(device="cpu", amp="off"))
            assert torch.get_num_threads() == 1
            set_up(RunConfig(device="cpu", amp="off", threads=2))  # as asked for
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    def test_set_up_seeds_and_sets_threads(self):
        settings = RunConfig(device="cpu", amp="bf16", threads=2, seed=3)
        threads = torch.get_num_threads()
        try:
            assert set_up(settings) == (CPU, "bf16")
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)
        drawn = torch.rand(5)
        seed_everything(3)
        assert torch.equal(drawn, torch.rand(5))


def test_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "cuda:1"):
        EagerRuntime("torch", "f32", torch.device(name)).synchronize()
    assert waited == [torch.device("cuda:1")]
