"""A real server process on loopback."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from helpers import ROOT

PATIENCE = 120  # seconds, of a test that waits for what should come at once


class Server:
    """A server process with a model."""

    def __init__(self, model: Path, *flags: object) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        given = ("--port", 0, "--name", "mine", "--threads", 1, "--max-batch", 8, *flags)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "early_exit.serve", str(model), *map(str, given)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.log: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self._read_log, daemon=True)
        self.reader.start()
        self.line = self.process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+) serves mine", self.line)
        assert found, (self.line, self.process.wait(PATIENCE), list(self.log.queue))
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _read_log(self) -> None:
        for line in self.process.stderr:
            self.log.put(line)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, and gives the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Waits for the end, and for the whole log; gives the exit code."""
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code
