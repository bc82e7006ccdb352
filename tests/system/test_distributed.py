"""Several processes: they compute what one computes, agree on a stop, and end when one is lost."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import TINY, children, finish, is_stopped, needs_proc, start, told_once, wait_for

from early_exit.errors import Failed, UserError
from early_exit.system import distributed
from early_exit.system.distributed import Group
from early_exit.training import checkpoint

FLAGS = (*TINY, "--exits", "layer1")
# How far two ways to compute the same training may part, all in float64: each rounding is 1e-16 of
# a number, and twelve steps may magnify it a hundred thousand times. An image that counted twice,
# or for one process only, would show in the second digit.
DRIFT = 1e-10


def launch(directory: Path, *flags: object, signals=("none", 0), processes=2, **options):
    """Starts the tiny trainer into `directory`."""
    return start(
        "tests/helpers.py",
        *signals,
        *FLAGS,
        "--save-dir",
        directory,
        *flags,
        cwd=directory.parent,
        processes=processes,
        DOUBLE="1",
        **options,
    )


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    """The weights that a run ended with, without BatchNorm's statistics."""
    network = checkpoint.load(directory)["network"]
    return {k: v for k, v in network.items() if "running" not in k and "num_batches" not in k}


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def assert_same_weights(found: Path, wanted: Path) -> None:
    """To the bit."""
    expected = parameters(wanted)
    for name, value in parameters(found).items():
        assert torch.equal(value, expected[name]), name


def assert_close_weights(found: Path, wanted: Path) -> None:
    """Up to the roundings of another order of the same sums."""
    expected = parameters(wanted)
    for name, value in parameters(found).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[name], rtol=DRIFT, atol=DRIFT, msg=name)


def stopped_child(process: subprocess.Popen) -> int:
    """Waits until one of the processes that torchrun started has stopped; gives its number."""

    def find() -> int | None:
        assert process.poll() is None, finish(process).stderr
        return next(filter(is_stopped, children(process.pid)), None)

    return wait_for(find, "a process that stops")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes, not interrupted."""
    directory = tmp_path_factory.mktemp("pair") / "run"
    done = finish(launch(directory))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cifar10/eval.py") == 1  # the end, told by one of the two
    return directory


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_micro_batches(pair, tmp_path):
    done = finish(launch(tmp_path / "one", "--accumulate", 2, processes=0))
    assert done.returncode == 0, done.stderr
    assert losses(pair) == pytest.approx(losses(tmp_path / "one"), rel=DRIFT)
    assert_close_weights(pair, tmp_path / "one")
    # momenta are sums of gradients
    found, wanted = (checkpoint.load(d)["optimizer"]["state"] for d in (pair, tmp_path / "one"))
    for number, state in found.items():
        torch.testing.assert_close(
            state["momentum_buffer"], wanted[number]["momentum_buffer"], rtol=DRIFT, atol=DRIFT
        )


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_two_processes_train_a_short_recipe_as_one(pair, tmp_path, frozen):
    """The first block is trained in the first of two epochs, or the backbone in none. The
    frozen backbone is one and the same, because BatchNorm's statistics, which it uses, are updated
    by the main process's images alone."""
    flags = ("--set", "optim.stem_epochs=1")
    if frozen:
        flags = ("--regime", "frozen", "--backbone", pair)
    for name, options in (("two", {}), ("one", {"processes": 0})):
        more = () if name == "two" else ("--accumulate", 2)
        done = finish(launch(tmp_path / name, *flags, *more, **options))
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=DRIFT)
    assert_close_weights(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_an_error_is_reported_once_and_ends_all(tmp_path):
    done = finish(launch(tmp_path / "run", "-b", 6, "--accumulate", 2))
    assert done.returncode == 1  # torchrun's
    message = told_once(done.stderr, "trainer.py")
    assert "--accumulate" in message and re.search(r"\b6 images\b.*\b4\b", message)


@pytest.mark.slow
def test_an_error_of_the_main_process_is_reported_once(tmp_path):
    done = finish(
        start("imagenet/main.py", tmp_path / "none", "--device", "cpu", cwd=tmp_path, processes=2)
    )
    assert done.returncode == 1
    assert str(tmp_path / "none") in told_once(done.stderr, "main.py")
    assert "[rank1]" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("whom", "batch"), [("SIGTERM@1", 3), ("SIGTERM@1", 8), ("SIGTERM@up", 2)])
def test_a_signal_to_one_stops_all_where_all_can_resume(pair, tmp_path, whom, batch):
    directory = tmp_path / "run"
    done = finish(launch(directory, signals=(whom, batch)))
    assert done.returncode == 1
    assert str(directory) in told_once(done.stderr, "trainer.py")
    saved = checkpoint.load(directory)["position"]
    assert 0 <= 6 * saved["epoch"] + saved["step"] - batch - 1 <= 9 * (whom == "SIGTERM@up")
    done = finish(launch(directory, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    # sums of all processes so far, and of each since then, are added in another order
    assert losses(directory) == pytest.approx(losses(pair), rel=DRIFT)
    assert_same_weights(directory, pair)


@pytest.mark.slow
def test_another_number_of_processes_may_resume(pair, tmp_path):
    directory = tmp_path / "run"
    finish(launch(directory, signals=("SIGTERM@0", 4)))
    done = finish(launch(directory, "--resume", "auto", "--accumulate", 2, processes=0))
    assert done.returncode == 0, done.stderr
    assert losses(directory) == pytest.approx(losses(pair), rel=DRIFT)


@needs_proc
@pytest.mark.slow
def test_when_one_is_killed_all_end_and_the_same_command_resumes(pair, tmp_path):
    directory = tmp_path / "run"
    # a patience that outlasts the test: the others must not end by it
    process = launch(directory, "--resume", "auto", signals=("SIGSTOP@0", 8), PATIENCE="7200")
    stopped = stopped_child(process)
    assert (directory / checkpoint.NAME).exists()  # the first epoch is saved
    others = set(children(process.pid)) - {stopped}
    assert others
    os.kill(stopped, signal.SIGKILL)
    assert finish(process).returncode not in (0, -signal.SIGKILL)  # which `finish` sends at last
    assert [pid for pid in others if Path(f"/proc/{pid}").exists()] == []
    done = finish(launch(directory, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert_same_weights(directory, pair)


@pytest.fixture
def port():
    """A port that nobody listens to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "falls silent"])
def test_when_a_machine_is_lost_the_other_ends_and_both_resume(pair, tmp_path, port, signum):
    directory = tmp_path / "run"
    nodes = [
        launch(
            directory,
            "--resume",
            "auto",
            signals=("SIGSTOP@1", 8),
            processes=1,
            node=(number, port),
            PATIENCE="30",
        )
        for number in range(2)
    ]
    stopped_child(nodes[1])
    assert (directory / checkpoint.NAME).exists()  # the first epoch is saved
    lost = [*children(nodes[1].pid), nodes[1].pid]
    for pid in lost:
        os.kill(pid, signum)
    done = finish(nodes[0])
    assert done.returncode == 1
    assert told_once(done.stderr, "trainer.py")  # an error of its own, no traceback
    for pid in lost:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    finish(nodes[1])
    nodes = [
        launch(directory, "--resume", "auto", processes=1, node=(number, port))
        for number in range(2)
    ]
    for node in nodes:
        done = finish(node)
        assert done.returncode == 0, done.stderr
    assert_same_weights(directory, pair)


@pytest.mark.slow
def test_every_held_out_image_is_scored_once(pair, tmp_path):
    flags = ("--resume", pair, "-e", "--split", "test")
    alone, together = (
        finish(
            start(
                "tests/helpers.py",
                "none",
                0,
                *FLAGS,
                *flags,
                cwd=tmp_path,
                processes=processes,
                DOUBLE="1",
            )
        )
        for processes in (0, 2)
    )
    assert alone.stdout == together.stdout and alone.stdout.startswith("test layer1 ")


def test_alone_nothing_is_communicated():
    group = Group()
    assert group.is_main
    assert group.agree(None) is None and group.agree(15) == 15
    assert group.sum(torch.tensor([1, 2])).tolist() == [1, 2]
    assert group.broadcast("here") == "here"
    with group.main_process_first():
        group.barrier()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Connection closed by peer"), distributed.Lost),
        (Failed("the loss is nan; the last good checkpoint: runs/skip-connections"), Failed),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
def test_what_is_called_the_loss_of_another_process(monkeypatch, error, kind):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError) as caught:
        with distributed.raise_if_lost():
            raise error
    assert type(caught.value) is kind


def test_processes_that_do_not_meet_raise_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # and no address to meet at
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"\b2\b.*torchrun"):
        with distributed.process_group(torch.device("cpu")):
            pass
