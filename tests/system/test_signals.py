"""Signals: they stop a program where it can save its state."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT, needs_proc

from early_exit.system import signals, torchrun


class TestExitOnSigterm:
    def test_sigterm_raises_once(self):
        before = signal.getsignal(signal.SIGTERM)
        try:
            signals.raise_on_signals("x.py")
            with pytest.raises(signals.Stopped, match=r"\b15\b") as stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
            assert stopped.value.code == 143
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_except_exception_does_not_catch_it(self):
        with pytest.raises(signals.Stopped):
            try:
                raise signals.Stopped("stopped", signal.SIGTERM)
            except Exception:
                pass


class TestStopSignals:
    @pytest.mark.parametrize("signum", signals.STOPPING)
    def test_with_raise_at_once_the_first_one_raises(self, signum):
        with signals.StopSignals() as stop:
            stop.raise_if_signalled()
            with pytest.raises(signals.Interrupted):
                os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signum

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_an_exception_that_python_drops_is_raised_again(self, monkeypatch):
        monkeypatch.setattr(signals, "PATIENCE", 1.0)

        class Dropped:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)

        with signals.StopSignals() as stop:
            stop.raise_if_signalled()
            with pytest.raises(signals.Interrupted):
                Dropped()  # whose __del__ raises Interrupted in vain
                while True:
                    signal.pause()
            stop.raise_at_once = False
            assert stop.signum == signal.SIGTERM

    def test_after_that_it_is_not_raised_again(self):
        with signals.StopSignals() as stop:
            stop.raise_if_signalled()
            with pytest.raises(signals.Interrupted):
                stop._give_up(signal.SIGALRM, None)
            stop.raise_at_once = False
            stop._give_up(signal.SIGALRM, None)

    def test_one_that_came_before_raises_too(self):
        with signals.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(signals.Interrupted):
                stop.raise_if_signalled()

    def test_after_raise_at_once_is_cleared_it_is_only_recorded(self):
        with signals.StopSignals() as stop:
            stop.raise_if_signalled()
            stop.raise_at_once = False
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM

    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_is_recorded_and_the_program_continues(self, signum):
        with signals.StopSignals() as stop:
            assert stop.signum is None
            os.kill(os.getpid(), signum)
            assert stop.signum == signum

    def test_a_second_signal_changes_nothing(self):
        with signals.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGTERM

    def test_the_handlers_before_are_put_back(self):
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        with signals.StopSignals():
            assert signal.getsignal(signal.SIGTERM) is not before[0]
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before

    def test_the_handlers_before_are_put_back_after_an_error(self):
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(ZeroDivisionError), signals.StopSignals():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGINT) is before

    def test_in_a_thread_that_cannot_handle_signals_the_program_runs_without(self):
        def steps():
            with signals.StopSignals() as stop:
                return list(stop.wait_for("ab")), stop.signum

        before = signal.getsignal(signal.SIGTERM)
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(steps).result() == (["a", "b"], None)
        assert signal.getsignal(signal.SIGTERM) is before

    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_exit_code_of_a_stop(self, signum, code):
        assert signals.Stopped("stopped", signum).code == code

    def test_what_does_not_come_after_a_signal_is_not_waited_for(self, monkeypatch):
        monkeypatch.setattr(signals, "PATIENCE", 0.05)

        def items():
            yield "first"
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                signal.pause()

        with signals.StopSignals() as stop:
            waited = stop.wait_for(items())
            assert next(waited) == "first"
            with pytest.raises(signals.Interrupted):
                next(waited)
            assert stop.signum == signal.SIGTERM

    def test_what_comes_after_a_signal_is_given(self):
        with signals.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert list(stop.wait_for("ab")) == ["a", "b"]

    def test_what_nohup_ignores_stays_ignored(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with signals.StopSignals() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.signum is None
        finally:
            signal.signal(signal.SIGHUP, before)


@needs_proc
def test_a_process_that_starts_while_signals_are_held_back_never_gets_them():
    with signals.held_back():
        process = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
        process.start()
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (mask,) = re.findall(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
        assert all(int(mask, 16) >> (number - 1) & 1 for number in signals.STOPPING)
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        process.kill()


def test_a_signal_during_imports_is_the_last_line_too(tmp_path):
    code = "from early_exit.system import signals; signals.end_at_once('x.py', 15)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, torchrun.LAST_LINE: str(tmp_path / "last")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 143
    assert (tmp_path / "last").read_text() == done.stderr != ""
