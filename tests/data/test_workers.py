"""Worker processes: how long they live, and files that cannot be decoded."""

import dataclasses
import gc
import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
from helpers import (
    children,
    file_names,
    finish,
    load_folders,
    make_folders,
    needs_proc,
    read_all,
    start,
    wait_for,
    wait_for_file,
)

from early_exit.errors import UserError
from early_exit.system.signals import STOPPING


@pytest.fixture
def folders(tmp_path):
    """Three classes of 8 train and 4 test images."""
    return make_folders(tmp_path / "set")


def ignores(pid, signum):
    """Whether a process ignores a signal, by the kernel's mask."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)
    return int(mask, 16) >> (signum - 1) & 1 == 1


class TestWorkers:
    def test_the_same_processes_serve_every_split_and_epoch(self, folders):
        loaded = load_folders(folders, workers=2)
        list(loaded.train_batches(6, 0, 0))
        first = [worker.pid for worker in loaded.pool._loader._iterator._workers]
        list(loaded.eval_batches("val", 4))
        next(loaded.eval_batches("test", 4))  # and what is not read to its end
        assert len(read_all(loaded.train_batches(6, 0, 1))[0]) == 18
        assert [worker.pid for worker in loaded.pool._loader._iterator._workers] == first

    def test_they_end_with_their_data(self, folders):
        loaded = load_folders(folders, workers=2)
        next(loaded.train_batches(2, 0, 0))  # some of the keys have not been asked for
        workers = loaded.pool._loader._iterator._workers
        gc.disable()  # a circle of references would be found too late
        del loaded
        gc.enable()
        assert [worker.exitcode for worker in workers] == [0, 0]  # told to, not killed

    @needs_proc
    def test_a_signal_to_all_processes_does_not_end_them(self, folders):
        loaded = load_folders(folders, workers=2)
        batches = loaded.train_batches(3, 0, 0)
        next(batches)
        workers = loaded.pool._loader._iterator._workers
        for worker in workers:
            for signum in STOPPING:
                # a signal that is ignored is gone once it was sent, there is nothing to wait for
                wait_for(partial(ignores, worker.pid, signum), "a worker that ignores it")
                os.kill(worker.pid, signum)
        assert len(list(batches)) == 5
        assert all(worker.is_alive() for worker in workers)

    @needs_proc
    @pytest.mark.slow
    def test_one_that_hangs_keeps_a_stopped_run_neither_from_saving_nor_from_ending(
        self, folders, tmp_path
    ):
        run = tmp_path / "run"
        sizes = ("--train-crop", 16, "--val-crop", 16, "--val-resize", 16, "--val-size", 6)
        flags = ("--arch", "resnet18", "--exits", "layer2", "-b", 6, "--epochs", 10_000, "-j", 2)
        machine = ("--device", "cpu", "--threads", 1, "--amp", "off", "--save-dir", run)
        process = start("imagenet/main.py", folders, *flags, *sizes, *machine, cwd=tmp_path)
        wait_for_file(run / "checkpoint.pt", process)
        for worker in children(process.pid):  # as one that waits for a file server
            os.kill(worker, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        done = finish(process)
        assert done.returncode == 143 and done.stderr.count("\n") == 1
        assert "--resume" in done.stderr


class TestBadFiles:
    @pytest.fixture(params=["empty", "torn", "text", "gone"])
    def bad(self, folders, request):
        loaded = load_folders(folders)  # so that a file may go after it was listed
        path = Path(file_names(loaded, "train")[4])
        if request.param == "gone":
            path.unlink()
        else:
            whole = path.read_bytes()
            contents = {"empty": b"", "torn": whole[:300], "text": b"no image"}
            path.write_bytes(contents[request.param])
        return loaded, path

    @pytest.mark.parametrize("workers", [0, 2])
    def test_stops_the_run_with_one_line(self, bad, workers):
        loaded, path = bad
        loaded = dataclasses.replace(loaded, workers=workers)
        with pytest.raises(UserError, match=f"{path}.*--bad-files"):
            list(loaded.train_batches(6, 0, 0))

    def test_or_is_named_once_and_another_is_there_twice(self, bad, caplog):
        loaded, path = bad
        loaded = dataclasses.replace(loaded, bad_files=1)
        for epoch in range(2):
            images, _ = read_all(loaded.train_batches(6, 0, epoch))
            assert len(images) == 18
        assert sum(str(path) in message for message in caplog.messages) == 1

    def test_the_limit_is_one_of_files(self, bad):
        loaded, _ = bad
        other = Path(file_names(loaded, "train")[7])
        other.write_bytes(b"")
        with pytest.raises(UserError, match=r"\b1\b.*--bad-files"):
            list(dataclasses.replace(loaded, bad_files=1).train_batches(6, 0, 0))
        assert len(list(dataclasses.replace(loaded, bad_files=2).train_batches(6, 0, 0))) == 3

    def test_held_out_images_are_missing(self, folders):
        loaded = load_folders(folders, bad_files=3)
        Path(file_names(loaded, "test")[1]).write_bytes(b"")
        images, targets = read_all(loaded.eval_batches("test", 5))
        assert len(images) == 11
        assert targets.tolist() == [0] * 3 + [1] * 4 + [2] * 4

    def test_a_whole_batch_of_them(self, folders):
        loaded = load_folders(folders, bad_files=3)
        for name in [*file_names(loaded, "test")[:2], file_names(loaded, "train")[0]]:
            Path(name).write_bytes(b"")
        assert len(read_all(loaded.eval_batches("test", 2))[0]) == 10
        with pytest.raises(UserError, match=file_names(loaded, "train")[0]):
            list(loaded.train_batches(1, 0, 0))
