"""The pool of threads that ONNX Runtime's sessions share."""

from types import SimpleNamespace

import pytest

from early_exit.inference.runtimes import threads


@pytest.mark.parametrize(("wanted", "count"), [(None, 3), (2, 2)])
def test_by_default_there_is_a_thread_for_each_processor_of_the_container(
    monkeypatch, wanted, count
):
    pools = []
    package = SimpleNamespace(set_global_thread_pool_sizes=lambda *sizes: pools.append(sizes))
    monkeypatch.setattr(threads, "import_package", lambda _: package)
    monkeypatch.setattr(threads, "processors", lambda: 3)
    monkeypatch.setattr(threads, "_pool", [])
    threads.share_threads(wanted)
    assert pools == [(count, 1)]
