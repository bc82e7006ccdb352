"""torch.compile: one build, no compilation after it, and results that stay valid."""

import shutil

import pytest
import torch
from helpers import assert_close

from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.compiled import CompiledRuntime
from early_exit.inference.runtimes.network import RuntimeNetwork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["f32", "bf16"])
def compiled(request, make_net):
    """A network of two exits with all its segments compiled, and its state as it was before."""
    net = make_net(("layer2",)).eval()
    before = {name: values.clone() for name, values in net.state_dict().items()}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    run = RuntimeNetwork(net, CompiledRuntime("compile", request.param, CPU), images)
    run.segment(0, 0, "max_prob")
    run.segment(1, 1, "max_prob")
    return run, before


def some(rows, seed=1):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def middle(run, images):
    """A policy by which half of the images exit early."""
    with run.runtime.context():
        score = run.segment(0, 0, "max_prob")(run.runtime.array(images), 1.0, None)[3]
    return Policy(exit_names=run.network.exit_names, thresholds=(float(score.median()),))


def test_no_later_call_compiles(compiled):
    """Whatever the number of rows, the layout, the temperature and where the images were made."""
    run, _ = compiled
    policy = middle(run, some(64))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (1, 2, 3, 15, 16, 17, 33, 100):
            run.infer(some(rows), policy)
            run(some(rows))
        run.infer(some(5).to(memory_format=torch.channels_last), policy)
        with torch.inference_mode():
            run.infer(some(5).clone(), policy)
        with run.runtime.context():
            run.segment(0, 0, "max_prob")(run.runtime.array(some(4)), 3.0, None)


def test_the_build_states_its_seconds(compiled):
    run, _ = compiled
    assert run.segment(0, 0, "max_prob").compile_seconds > 0


def test_the_network_is_not_changed(compiled):
    run, before = compiled
    for name, values in run.network.state_dict().items():
        assert torch.equal(values, before[name]) and values.stride() == before[name].stride()


def test_results_and_inputs_outlast_later_calls(compiled):
    """Residual additions in place are of the graph's own memory alone."""
    run, _ = compiled
    first, second = run.segment(0, 0, "max_prob"), run.segment(1, 1, "max_prob")
    with run.runtime.context():
        images = run.runtime.array(some(7))
        features, *rest = first(images, 1.0, None)
        last = second(features, 1.0, None)
        kept = [result.clone() for result in (images, features, *rest[:3], *last[:4])]
        first(run.runtime.array(some(7, seed=2)), 1.0, None)
        second(features + 1, 1.0, None)
    results = (images, features, *rest[:3], *last[:4])
    assert all(map(torch.equal, results, kept))


def test_a_network_without_exits_is_compiled_too(compiled, monkeypatch):
    run, _ = compiled
    if run.runtime.precision != "f32":
        pytest.skip("bfloat16 differs by more than a sharp bound")
    monkeypatch.setattr("early_exit.inference.runtimes.compiled.WARM_ROWS", (2,))
    with run.runtime.context():
        found = run.plain()(run.runtime.array(some(7)))
    with torch.no_grad():
        expected = run.network.backbone(some(7))
    # 3x3 convolutions of 3 channels, three of 16, two of 32 with one of 16 before, 64 the same
    assert_close(found, expected, terms=9 * (3 + 3 * 16 + 32 + 32 + 64) + 100)
