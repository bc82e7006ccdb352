"""Several processes: they compute what one computes, agree on a stop, and end when one is lost."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from scripts import TINY, finish, start

from early_exit import checkpoint, distributed
from early_exit.distributed import Group
from early_exit.errors import UserError

FLAGS = (*TINY, "--exits", "layer1")


def launch(directory: Path, *flags: object, signals=("none", 0), processes=2, **options):
    """Starts the tiny trainer into `directory`."""
    return start(
        "tests/scripts.py", *signals, *FLAGS, "--save-dir", directory, *flags,
        cwd=directory.parent, processes=processes, **options,
    )


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    """The weights that a run ended with, without BatchNorm's statistics."""
    network = checkpoint.load(directory)["network"]
    return {k: v for k, v in network.items() if "running" not in k and "num_batches" not in k}


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes that nobody disturbed."""
    directory = tmp_path_factory.mktemp("pair") / "run"
    done = finish(launch(directory))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory") == done.stdout.count("trained: ") == 1
    return directory


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_in_two_goes(pair, tmp_path):
    done = finish(launch(tmp_path / "one", "--accumulate", 2, processes=0))
    assert done.returncode == 0, done.stderr
    assert losses(pair) == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
    expected = parameters(tmp_path / "one")
    for name, value in parameters(pair).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    # momenta are sums of gradients
    found, wanted = (checkpoint.load(d)["optimizer"]["state"] for d in (pair, tmp_path / "one"))
    for number, state in found.items():
        torch.testing.assert_close(
            state["momentum_buffer"], wanted[number]["momentum_buffer"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_all(tmp_path):
    done = finish(launch(tmp_path / "run", "-b", 6, "--accumulate", 2))
    assert done.returncode == 1  # torchrun's
    assert done.stderr.count("cannot be cut into 4 equal parts of two or more") == 1


@pytest.mark.slow
def test_a_mistake_that_the_first_finds_is_told_once(tmp_path):
    done = finish(start(
        "imagenet/main.py", tmp_path / "none", "--device", "cpu", cwd=tmp_path, processes=2
    ))
    assert done.returncode == 1
    assert done.stderr.count("main.py: there is no directory") == 1
    assert "[rank1]" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("whom", "batch"), [("SIGTERM@1", 3), ("SIGTERM@1", 8), ("SIGTERM@up", 2)])
def test_a_signal_to_one_stops_all_where_all_can_go_on(pair, tmp_path, whom, batch):
    directory = tmp_path / "run"
    done = finish(launch(directory, signals=(whom, batch)))
    assert done.returncode == 1
    assert done.stderr.count("stopped by signal 15 and saved") == 1
    saved = checkpoint.load(directory)["position"]
    assert 0 <= 6 * saved["epoch"] + saved["step"] - batch - 1 <= 9 * (whom == "SIGTERM@up")
    done = finish(launch(directory, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert losses(directory) == losses(pair)
    expected = parameters(pair)
    for name, value in parameters(directory).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_another_number_of_processes_may_go_on(pair, tmp_path):
    directory = tmp_path / "run"
    finish(launch(directory, signals=("SIGTERM@0", 4)))
    done = finish(launch(directory, "--resume", "auto", "--accumulate", 2, processes=0))
    assert done.returncode == 0, done.stderr
    assert losses(directory) == pytest.approx(losses(pair), rel=1e-6)


@pytest.mark.slow
def test_when_one_is_killed_all_end_and_the_same_command_goes_on(pair, tmp_path):
    directory = tmp_path / "run"
    process = launch(directory, "--resume", "auto", signals=("SIGSTOP@0", 8))
    began = time.monotonic()
    while not (directory / checkpoint.NAME).exists():  # the first epoch is saved
        assert time.monotonic() - began < 120 and process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    stopped, other = children(process.pid)[:2]
    os.kill(stopped, signal.SIGKILL)
    killed = time.monotonic()
    assert finish(process).returncode != 0
    assert time.monotonic() - killed < 60
    assert not Path(f"/proc/{other}").exists()
    done = finish(launch(directory, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    expected = parameters(pair)
    for name, value in parameters(directory).items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def port():
    """A port that nobody listens to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "falls silent"])
def test_when_a_machine_is_lost_the_other_ends_and_both_started_anew_go_on(
    pair, tmp_path, port, signum
):
    directory = tmp_path / "run"
    nodes = [
        launch(
            directory, "--resume", "auto", signals=("SIGSTOP@1", 8), processes=1,
            node=(number, port), PATIENCE="10",
        )
        for number in range(2)
    ]
    began = time.monotonic()
    while not (directory / checkpoint.NAME).exists():
        assert time.monotonic() - began < 120 and nodes[0].poll() is None
        time.sleep(0.05)
    time.sleep(1)
    lost = [*children(nodes[1].pid), nodes[1].pid]
    for pid in lost:
        os.kill(pid, signum)
    done = finish(nodes[0])
    assert done.returncode == 1
    assert "trainer.py: another process of this run is gone" in done.stderr, done.stderr
    assert time.monotonic() - began < 120
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    finish(nodes[1])
    nodes = [
        launch(directory, "--resume", "auto", processes=1, node=(number, port))
        for number in range(2)
    ]
    for node in nodes:
        done = finish(node)
        assert done.returncode == 0, done.stderr
    expected = parameters(pair)
    for name, value in parameters(directory).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_every_held_out_image_is_scored_once(pair, tmp_path):
    flags = ("--resume", pair, "-e", "--split", "test")
    alone, together = (
        finish(start(
            "tests/scripts.py", "none", 0, *FLAGS, *flags, cwd=tmp_path, processes=processes
        ))
        for processes in (0, 2)
    )
    assert alone.stdout == together.stdout and alone.stdout.startswith("test layer1 ")


def test_alone_nothing_is_sent():
    group = Group()
    assert group.leads
    assert group.agree(None) is None and group.agree(15) == 15
    assert group.total(torch.tensor([1, 2])).tolist() == [1, 2]
    assert group.leaders("here") == "here"
    with group.leader_first():
        group.wait()


def test_processes_that_do_not_meet_are_told_in_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # and no address to meet at
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="one of 2 by its environment.*start all with torchrun"):
        with distributed.joined(torch.device("cpu")):
            pass
