"""Decorations of a result: a picture or a page that fails is left out with one line."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from early_exit.errors import UserError
from early_exit.system.text import shortened

log = logging.getLogger(__name__)


@contextmanager
def optional(name: str) -> Iterator[None]:
    """A block whose error, of any kind, is one line that says what is left out and why.

    name: of what the block makes.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # libraries that draw may raise anything
        log.warning("%s is left out: %s", shortened(name, 200), _reason(error))
        log.debug("why it is left out", exc_info=error)


def _reason(error: Exception) -> str:
    """The error in one short line."""
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, ImportError):
        return f"{shortened(first, 200)}; run: pip install -r requirements.txt"
    if isinstance(error, UserError):
        return shortened(first, 400)
    return shortened(f"{type(error).__name__}: {first}" if first else type(error).__name__, 300)
