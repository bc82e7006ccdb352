"""One pool of threads for all of ONNX Runtime's sessions of the process."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from early_exit.inference.runtimes.packages import import_package
from early_exit.system.processors import processors

log = logging.getLogger(__name__)


_pool: list[int] = []  # how many threads the process's pool has, once it is there


def share_threads(count: int | None) -> None:
    """Makes one pool of threads for all sessions of the process: the pools of several would compete
    for the cores, which takes four times as long. None: one thread per processor that the process
    may use.

    The pool cannot be changed: a later call has no effect, and a log line says so if it asks for
    another number. ONNX Runtime then refuses sessions with threads of their own in this process.
    """
    count = count or processors()
    if not _pool:
        import_package("onnxruntime").set_global_thread_pool_sizes(count, 1)
        _pool.append(count)
    elif _pool != [count]:
        log.warning(
            "ONNX Runtime keeps the %d threads that this process began with; %d were asked for",
            _pool[0],
            count,
        )


@contextmanager
def sharing_threads(threads: int | None) -> Iterator[None]:
    """Makes the sessions that other packages open use the shared pool of threads: ONNX Runtime
    refuses any other once there is one."""
    share_threads(threads)
    runtime: Any = import_package("onnxruntime")
    plain = runtime.InferenceSession

    def session(model: Any, sess_options: Any = None, *rest: Any, **options: Any) -> Any:
        settings = sess_options or runtime.SessionOptions()
        settings.use_per_session_threads = False
        return plain(model, settings, *rest, **options)

    runtime.InferenceSession = session
    try:
        yield
    finally:
        runtime.InferenceSession = plain
