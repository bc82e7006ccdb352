"""OpenVINO: one model for many threads, and no bfloat16 where the processor has none."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import assert_names, refusal

from early_exit.inference.runtimes import openvino
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.inference.runtimes.openvino import OpenVINORuntime

pytest.importorskip("openvino")


def test_bf16_is_refused_where_the_processor_has_none(monkeypatch):
    monkeypatch.setattr(openvino, "capabilities", lambda: ["FP32", "INT8"])
    message = refusal(OpenVINORuntime("openvino-bf16", "bf16").load, b"")
    assert_names(message, "bf16", "the runtime openvino", "float32")


@pytest.mark.slow
def test_each_of_many_threads_gets_its_own_answers(trained_net, images):
    pytest.importorskip("onnxscript")
    network = RuntimeNetwork(trained_net, OpenVINORuntime(threads=1), images[:2])
    segment = network.segment(0, 0, "max_prob")
    batches = [part.numpy() for part in images[:128].split(8)]
    expected = [segment(batch)[1] for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: segment(batch)[1], 20 * batches))
    assert all(map(np.array_equal, found, 20 * expected))
