"""Downloads: what their errors mean."""

import http.client
import pickle
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from early_exit.errors import Unavailable, UserError
from early_exit.system.disk_errors import PERMANENT

SILENCE = 60.0  # seconds without a byte after which a connection is taken for lost
# What torch and torchvision raise for a connection that fails or breaks, and for a file that is not
# the expected one.
ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    pickle.PickleError,
    http.client.HTTPException,
)


@contextmanager
def downloading(url: str, instead: str) -> Iterator[None]:
    """A context that downloads `url`.

    instead: what the user can do without the network. Raises Unavailable if the download fails or
    gives another file than the expected one, which may pass; UserError if it cannot be stored.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    except UserError:
        raise
    except ERRORS as error:
        if isinstance(error, OSError) and error.errno in PERMANENT and error.filename:
            raise UserError(f"{error.filename} cannot be written: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        if re.search("corrupted|hash", reason) or isinstance(error, EOFError | pickle.PickleError):
            reason += ": not the expected file; it may be cut off, or the error page of a proxy"
        raise Unavailable(f"downloading {url} failed ({reason}); {instead}") from None
    finally:
        socket.setdefaulttimeout(before)
