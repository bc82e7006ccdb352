"""Checkpoints: whole or not at all, and every misfit one clear line."""

import errno
import logging
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_names, refusal
from hypothesis import given
from hypothesis import strategies as st

from early_exit.errors import Unavailable
from early_exit.system import files
from early_exit.training import checkpoint
from early_exit.training.checkpoint import NAME, PREVIOUS


def state(number: int) -> dict:
    """A checkpoint with a number, to be told from others."""
    return {"number": number, "network": {"weight": torch.full((64, 64), float(number))}}


def stored(path: Path) -> int:
    """Which one lies at `path`, whole."""
    found = checkpoint.load(path)
    assert torch.equal(found["network"]["weight"], state(found["number"])["network"]["weight"])
    return found["number"]


def truncate(path: Path) -> None:
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Changes a byte in the middle of a file: inside the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def without_middle(path: Path) -> None:
    """Its end, by which ZIP archives are recognised, is there."""
    content = path.read_bytes()
    path.write_bytes(content[:60] + content[70:])


def empty(path: Path) -> None:
    """Leaves nothing of a file."""
    path.write_bytes(b"")


class Interrupted(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def interrupt_replace(monkeypatch):
    """A function that makes the k'th os.replace from now on end the process instead."""

    def arm(k: int) -> None:
        calls = iter(range(10**6))
        replace = os.replace

        def counted(*arguments):
            if next(calls) == k:
                raise Interrupted
            replace(*arguments)

        monkeypatch.setattr(os, "replace", counted)

    return arm


class TestSave:
    @pytest.mark.parametrize("file", [NAME, PREVIOUS])
    def test_a_reader_that_has_it_open_ends_no_training(self, tmp_path, monkeypatch, caplog, file):
        """On CIFS, such a file can neither be renamed nor replaced."""
        replace = os.replace

        def busy(source, target):
            if str(tmp_path / file) in (str(source), str(target)):
                raise PermissionError(errno.EACCES, "Permission denied")
            replace(source, target)

        monkeypatch.setattr(files, "PAUSES", ())
        for number in (1, 2):
            checkpoint.save(tmp_path, state(number))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", busy)
            for number in (3, 4):
                checkpoint.save(tmp_path, state(number))
                assert stored(tmp_path) == number
        assert str(tmp_path / NAME) in caplog.text
        checkpoint.save(tmp_path, state(5))
        assert stored(tmp_path / NAME) == 5
        assert {path.name for path in tmp_path.iterdir()} == {NAME, PREVIOUS}

    def test_what_is_saved_is_loaded(self, tmp_path):
        checkpoint.save(tmp_path, state(1))
        assert stored(tmp_path / NAME) == 1

    def test_a_run_directory_stands_for_its_newest(self, tmp_path):
        checkpoint.save(tmp_path, state(1))
        assert stored(tmp_path) == 1

    def test_the_previous_one_stays_and_no_other(self, tmp_path):
        for number in (1, 2, 3):
            checkpoint.save(tmp_path, state(number))
        assert stored(tmp_path / NAME) == 3
        assert stored(tmp_path / PREVIOUS) == 2
        assert {path.name for path in tmp_path.iterdir()} == {NAME, PREVIOUS}

    def test_a_failure_while_writing_leaves_both_as_they_were(self, tmp_path, monkeypatch):
        checkpoint.save(tmp_path, state(1))
        checkpoint.save(tmp_path, state(2))

        def full(_state, file):
            file.write(b"half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(Unavailable, match="No space left on device"):
            checkpoint.save(tmp_path, state(3))
        assert stored(tmp_path / NAME) == 2
        assert stored(tmp_path / PREVIOUS) == 1
        assert {path.name for path in tmp_path.iterdir()} == {NAME, PREVIOUS}

    # the file under its temporary name, the newest to the previous, the new one to the newest
    @pytest.mark.parametrize(("k", "found"), [(0, 2), (1, 3), (2, 3)])
    def test_a_crash_before_each_rename_leaves_a_whole_newest(
        self, tmp_path, interrupt_replace, k, found
    ):
        checkpoint.save(tmp_path, state(1))
        checkpoint.save(tmp_path, state(2))
        interrupt_replace(k)
        with pytest.raises(Interrupted):
            checkpoint.save(tmp_path, state(3))
        assert stored(checkpoint.newest(tmp_path)[0]) == found

    @pytest.mark.parametrize(("k", "found"), [(0, None), (1, 1)])
    def test_a_crash_in_the_first_save_of_all(self, tmp_path, interrupt_replace, k, found):
        interrupt_replace(k)
        with pytest.raises(Interrupted):
            checkpoint.save(tmp_path, state(1))
        newest, _ = checkpoint.newest(tmp_path)
        assert (newest and stored(newest)) == found

    @pytest.mark.parametrize("k", [1, 2])
    def test_after_a_crash_a_run_directory_stands_for_its_newest(
        self, tmp_path, interrupt_replace, k
    ):
        checkpoint.save(tmp_path, state(1))
        checkpoint.save(tmp_path, state(2))
        interrupt_replace(k)
        with pytest.raises(Interrupted):
            checkpoint.save(tmp_path, state(3))
        assert stored(tmp_path) == 3

    @pytest.mark.parametrize("k", [0, 1, 2])
    def test_saving_after_a_crash_puts_all_in_order(self, tmp_path, interrupt_replace, k):
        checkpoint.save(tmp_path, state(1))
        interrupt_replace(k)
        with pytest.raises(Interrupted):
            checkpoint.save(tmp_path, state(2))
        checkpoint.save(tmp_path, state(3))  # its renames come after the k'th
        assert stored(checkpoint.newest(tmp_path)[0]) == 3
        assert stored(tmp_path / NAME) == 3
        assert not (tmp_path / f"{NAME}.new").exists()


class TestNewest:
    def test_none_where_there_is_none(self, tmp_path):
        assert checkpoint.newest(tmp_path) == (None, None)

    @pytest.mark.parametrize("damage", [truncate, flip, without_middle, empty])
    def test_a_torn_newest_falls_back_with_a_warning(self, tmp_path, caplog, damage):
        checkpoint.save(tmp_path, state(1))
        checkpoint.save(tmp_path, state(2))
        damage(tmp_path / NAME)
        with caplog.at_level(logging.WARNING):
            assert stored(checkpoint.newest(tmp_path)[0]) == 1
        (warning,) = caplog.messages
        assert_names(warning, tmp_path / NAME, PREVIOUS)

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
            OSError(errno.EIO, os.strerror(errno.EIO)),
            MemoryError(),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
        ],
    )
    def test_a_newest_that_cannot_be_read_now_may_be_whole(self, tmp_path, monkeypatch, error):
        """Going on from the previous one would overwrite it."""
        for step in range(2):
            checkpoint.save(tmp_path, {"step": step})
        read = torch.load

        def load(path, *rest, **options):
            if Path(path).name == checkpoint.NAME:
                raise error
            return read(path, *rest, **options)

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(Unavailable):
            checkpoint.newest(tmp_path)

    def test_without_checksums_a_file_is_read(self, tmp_path):
        before = torch.serialization.get_crc32_options()
        try:
            torch.serialization.set_crc32_options(False)
            checkpoint.save(tmp_path, {"step": torch.arange(3)})
        finally:
            torch.serialization.set_crc32_options(before)
        assert checkpoint.load(tmp_path)["step"].tolist() == [0, 1, 2]

    def test_no_warning_where_all_is_well(self, tmp_path, caplog):
        checkpoint.save(tmp_path, state(1))
        checkpoint.save(tmp_path, state(2))
        assert stored(checkpoint.newest(tmp_path)[0]) == 2
        assert not caplog.messages

    def test_none_whole_is_an_error(self, tmp_path):
        checkpoint.save(tmp_path, state(1))
        checkpoint.save(tmp_path, state(2))
        truncate(tmp_path / NAME)
        truncate(tmp_path / PREVIOUS)
        assert str(tmp_path) in refusal(checkpoint.newest, tmp_path)


class Executed:
    """Pickled, it would create a file when loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


class TestForeignFiles:
    def test_missing(self, tmp_path):
        path = tmp_path / "none.pt"
        assert_names(refusal(checkpoint.load, path), path)

    @pytest.mark.parametrize("damage", [truncate, flip, without_middle, empty])
    def test_damaged(self, tmp_path, damage):
        checkpoint.save(tmp_path, state(1))
        damage(tmp_path / NAME)
        assert_names(refusal(checkpoint.load, tmp_path / NAME), tmp_path / NAME)

    def test_a_flipped_byte_is_seen_by_its_checksum(self, tmp_path):
        checkpoint.save(tmp_path, state(1))
        flip(tmp_path / NAME)
        with zipfile.ZipFile(tmp_path / NAME) as archive:
            torn = archive.testzip()
        assert torn
        assert_names(refusal(checkpoint.load, tmp_path), tmp_path / NAME, torn)

    @pytest.mark.parametrize(
        "content", [b"hello, world\n", b"PK\x03\x04 only looks like an archive", b"\x80\x02."]
    )
    def test_no_checkpoint_at_all(self, tmp_path, content):
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        assert str(path) in refusal(checkpoint.load, path)

    def test_an_archive_of_something_else(self, tmp_path):
        path = tmp_path / "file.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "nothing")
        assert str(path) in refusal(checkpoint.load, path)

    def test_weights_from_elsewhere_are_shown_the_way(self, tmp_path):
        path = tmp_path / "weights.pt"
        torch.save({"weight": torch.zeros(1)}, path)
        assert_names(refusal(checkpoint.load, path), path, "--backbone")

    def test_a_bare_tensor(self, tmp_path):
        path = tmp_path / "weights.pt"
        torch.save(torch.zeros(1), path)
        message = refusal(checkpoint.load, path)
        assert_names(message, path)
        assert "--backbone" not in message  # which takes no bare tensor either

    @pytest.mark.parametrize("load", [checkpoint.load, partial(checkpoint.load_backbone, own={})])
    def test_code_in_a_torch_file_is_refused_and_not_run(self, tmp_path, load):
        path, trace = tmp_path / "evil.pt", tmp_path / "was-run"
        torch.save({"format": checkpoint.FORMAT, "network": Executed(trace)}, path)
        assert_names(refusal(load, path), path)
        assert not trace.exists()

    @pytest.mark.parametrize("load", [checkpoint.load, partial(checkpoint.load_backbone, own={})])
    def test_code_in_a_plain_pickle_is_refused_and_not_run(self, tmp_path, load):
        path, trace = tmp_path / "evil.pt", tmp_path / "was-run"
        path.write_bytes(pickle.dumps(Executed(trace), protocol=2))
        assert str(path) in refusal(load, path)
        assert not trace.exists()

    def test_the_pickle_that_is_refused_would_have_run(self, tmp_path):
        pickle.loads(pickle.dumps(Executed(tmp_path / "was-run")))
        assert (tmp_path / "was-run").exists()

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @given(content=st.binary(max_size=60), start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04"]))
    def test_any_bytes_end_in_one_line(self, tmp_path_factory, content, start):
        path = tmp_path_factory.mktemp("bytes") / "file.pt"
        path.write_bytes(start + content)
        assert str(path) in refusal(checkpoint.load, path)


class TestOtherClasses:
    """A backbone that was trained on another number of classes."""

    @pytest.fixture
    def public(self, make_net, tmp_path):
        """Weights of five more classes than the tests' network has, in a file."""
        other = make_net(num_classes=15, seed=1).backbone.state_dict()
        torch.save(other, tmp_path / "public.pt")
        return tmp_path / "public.pt", other

    def test_a_new_classifier_keeps_its_own_weights(self, make_net, public, caplog):
        caplog.set_level(logging.INFO)
        path, other = public
        net = make_net(num_classes=10)
        before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
        checkpoint.load_backbone_into(net, path, new_classifier=True)
        replaced = {name for name, value in other.items() if value.shape != before[name].shape}
        assert len(replaced) == 2  # weight and bias
        for name, value in net.backbone.state_dict().items():
            assert torch.equal(value, before[name] if name in replaced else other[name])
        assert_names(caplog.text, "15 classes", "10 classes")

    def test_a_frozen_backbone_needs_its_own_classes(self, make_net, public):
        path, _ = public
        net = make_net(num_classes=10)
        message = refusal(checkpoint.load_backbone_into, net, path, advice="; do something else")
        assert_names(message, path, "15 classes", 10, "do something else")
        assert refusal(checkpoint.load_backbone_into, net, path).endswith("the data have 10")

    def test_a_classifier_of_another_width_is_another_network(self, make_net, public):
        path, other = public
        name = next(name for name, value in other.items() if value.ndim == 2)
        torch.save({**other, name: torch.zeros(15, 3)}, path)
        message = refusal(
            checkpoint.load_backbone_into, make_net(num_classes=10), path, new_classifier=True
        )
        assert_names(message, "does not fit", name)
