"""The exit record: made, saved, read, and what policies do on it."""

import dataclasses
import errno
import json
import math
import mmap
import os
import re
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close, in_torch, refusal, replay, replayed_live

from early_exit.choosing import record as records
from early_exit.choosing.choice import choose
from early_exit.choosing.goals import MaxDrop
from early_exit.choosing.outcome import disagreements
from early_exit.choosing.record import ExitRecord, record, score_record
from early_exit.errors import Unavailable
from early_exit.inference.criteria import CRITERIA
from early_exit.inference.policy import NEVER, Policy
from early_exit.model.cost import Cost

CPU = torch.device("cpu")


def odds(first, classes=2):
    """Logits that give class 0 this probability, and the others equal shares of the rest."""
    rest = (1 - first) / (classes - 1)
    return [math.log(first), *[math.log(rest)] * (classes - 1)]


@pytest.fixture
def hand(make_record):
    """Four images, two early exits, two classes; class 0 is always correct."""
    return make_record(
        [
            [odds(0.95), odds(0.10), odds(0.60)],  # confident at once
            [odds(0.60), odds(0.90), odds(0.99)],  # confident at the second exit
            [odds(0.45), odds(0.55), odds(0.70)],  # never confident early
            [odds(0.05), odds(0.95), odds(0.95)],  # confident at once, and wrong
        ],
        [0, 0, 0, 0],
    )


def policy_for(record, **changes):
    """0.8 at the first exit and 0.7 at the second."""
    return Policy(**{"exit_names": record.info.exit_names, "thresholds": (0.8, 0.7), **changes})


def test_replay_by_hand(hand):
    replayed = replay(hand, policy_for(hand))
    assert replayed.exit_index.tolist() == [0, 1, 2, 0]
    assert replayed.answers.tolist() == [0, 0, 0, 1]


def test_replay_with_a_disabled_exit_by_hand(hand):
    # without the first exit, image 0 is answered by the second, wrongly, and image 3 correctly
    replayed = replay(hand, policy_for(hand, enabled=(False, True)))
    assert replayed.exit_index.tolist() == [1, 1, 2, 1]
    assert replayed.answers.tolist() == [1, 0, 0, 0]


def test_replay_without_exits_is_the_final_answer(hand):
    replayed = replay(hand, policy_for(hand, thresholds=(NEVER, NEVER)))
    assert replayed.exit_index.tolist() == [2, 2, 2, 2]
    assert replayed.answers.tolist() == [0, 0, 0, 0]


def test_replay_obeys_temperatures(hand):
    # at temperature 2 odds of 19 : 1 become 4.36 : 1, 0.813; of 9 : 1, 3 : 1, 0.75
    replayed = replay(hand, policy_for(hand, temperatures=(2.0, 2.0, 1.0)))
    assert replayed.exit_index.tolist() == [0, 1, 2, 0]
    # at temperature 3 the first exit's 19 : 1 become 2.67 : 1, 0.727, and image 0 remains
    replayed = replay(hand, policy_for(hand, temperatures=(3.0, 2.0, 1.0)))
    assert replayed.exit_index.tolist() == [1, 1, 2, 1]


def test_replay_of_patience_by_hand(hand):
    # answers by exit: 0 1 0; 0 0 0; 1 0 0; 1 0 0: only image 1 has repeated itself at exit 1
    policy = policy_for(hand, criterion="patience", thresholds=(1.0, 1.0))
    assert replay(hand, policy).exit_index.tolist() == [2, 1, 2, 2]


def test_patience_does_not_count_a_disabled_exit(make_record):
    # answers 0 1 0 | 0: with the middle exit disabled the third repeats the first
    logits = [[odds(0.9), odds(0.1), odds(0.9), odds(0.9)]]
    stored = make_record(logits, [0])
    policy = Policy(
        exit_names=stored.info.exit_names, thresholds=(1.0, 1.0, 1.0), criterion="patience"
    )
    assert replay(stored, policy).exit_index.tolist() == [3]
    disabled = dataclasses.replace(policy, enabled=(True, False, True))
    assert replay(stored, disabled).exit_index.tolist() == [2]


def test_scores_hold_which_exits_are_correct(hand):
    correct = score_record(hand, policy_for(hand)).correct
    assert correct.tolist() == [
        [True, False, True],
        [True, True, True],
        [False, True, True],
        [False, True, True],
    ]


def test_a_disabled_exit_has_the_lowest_score(hand):
    scored = score_record(hand, policy_for(hand, enabled=(True, False)))
    assert (scored.scores[:, 1] == -np.inf).all()
    assert np.isfinite(scored.scores[:, [0, 2]]).all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scoring_in_chunks_changes_nothing(stored, criterion, monkeypatch):
    policy = Policy(
        exit_names=stored.info.exit_names,
        thresholds=(0.5,) * 3,
        criterion=criterion,
        temperatures=(0.5, 2.0, 1.0, 1.5),
    )
    whole = score_record(stored, policy)
    # 300 of 2,048 images at a time: six chunks and a shorter one
    monkeypatch.setattr(records, "CHUNK_BYTES", 300 * stored.logits[0].nbytes)
    assert [rows.stop - rows.start for rows, _ in stored.chunks()] == [300] * 6 + [248]
    chunked = score_record(stored, policy)
    # a softmax of four classes; a kernel may take the last rows of a chunk another way
    scores = torch.from_numpy(chunked.scores), torch.from_numpy(whole.scores)
    assert_close(*scores, terms=64)
    assert np.array_equal(chunked.answers, whole.answers)


def test_a_record_is_read_as_it_was_saved(hand, tmp_path):
    hand.save(tmp_path / "val")
    read = ExitRecord.load(tmp_path / "val")
    assert np.array_equal(read.logits, hand.logits)
    assert np.array_equal(read.targets, hand.targets)
    assert read.logits.dtype == np.float32
    assert read.info == hand.info
    assert not isinstance(read.logits, np.memmap)


def test_a_large_record_is_mapped_and_replays_alike(hand, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAPPED_BYTES", 10)
    hand.save(tmp_path / "val")
    read = ExitRecord.load(tmp_path / "val")
    assert isinstance(read.logits, np.memmap)
    policy = policy_for(hand)
    assert np.array_equal(replay(read, policy).exit_index, replay(hand, policy).exit_index)


def test_a_file_system_without_memory_maps(
    tiny_net, images, targets, record_of, tmp_path, monkeypatch
):
    """As many mounts of object stores."""

    def none(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    info = record_of(tiny_net, images[:8], targets[:8]).info
    monkeypatch.setattr(records, "MAPPED_BYTES", 10)
    monkeypatch.setattr(mmap, "mmap", none)
    batches = [(images[:8], targets[:8])]
    made = record(tiny_net, batches, 8, info, CPU, nullcontext, tmp_path / "test")
    expected = record(tiny_net, batches, 8, info, CPU, nullcontext)
    assert np.array_equal(made.logits, expected.logits)
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_saving_again_replaces_the_record_and_nothing_else_remains(hand, make_record, tmp_path):
    hand.save(tmp_path / "val")
    later = make_record([[odds(0.5), odds(0.5)]], [1])
    later.save(tmp_path / "val")
    assert len(ExitRecord.load(tmp_path / "val")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["val"]


def test_a_save_that_fails_keeps_the_earlier_record(hand, make_record, tmp_path, monkeypatch):
    hand.save(tmp_path / "val")

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(Unavailable, match=f"{tmp_path / 'val'}.*No space left"):
        make_record([[odds(0.5), odds(0.5)]], [1]).save(tmp_path / "val")
    assert len(ExitRecord.load(tmp_path / "val")) == 4


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["logits.npy", "targets.npy", "info.json"])
@pytest.mark.parametrize("damage", [half, lambda path: path.unlink()], ids=["torn", "missing"])
def test_a_torn_record_is_refused_in_one_line(hand, tmp_path, name, damage):
    hand.save(tmp_path / "val")
    damage(tmp_path / "val" / name)
    assert str(tmp_path / "val") in refusal(ExitRecord.load, tmp_path / "val")


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "keep",
    [0, 300],
)
def test_a_torn_record_of_any_length_is_refused(hand, tmp_path, monkeypatch, keep, mapped):
    big = ExitRecord(np.tile(hand.logits, (50, 1, 1)), np.tile(hand.targets, 50), hand.info)
    big.save(tmp_path / "val")
    path = tmp_path / "val" / "logits.npy"
    path.write_bytes(path.read_bytes()[:keep])
    monkeypatch.setattr(records, "MAPPED_BYTES", -1 if mapped else 1 << 30)
    assert str(tmp_path / "val") in refusal(ExitRecord.load, tmp_path / "val")


@pytest.mark.parametrize(
    "content",
    ['{"split": "val"}', "[1, 2]", "null"],
)
def test_a_record_with_other_fields_is_refused(hand, tmp_path, content):
    hand.save(tmp_path / "val")
    (tmp_path / "val" / "info.json").write_text(content)
    assert str(tmp_path / "val") in refusal(ExitRecord.load, tmp_path / "val")


def test_a_missing_record_is_refused_in_one_line(tmp_path):
    assert str(tmp_path / "val") in refusal(ExitRecord.load, tmp_path / "val")


def test_a_record_with_an_unknown_field_is_refused(hand, tmp_path):
    hand.save(tmp_path / "val")
    info = json.loads((tmp_path / "val" / "info.json").read_text())
    (tmp_path / "val" / "info.json").write_text(json.dumps({**info, "colour": "red"}))
    assert str(tmp_path / "val") in refusal(ExitRecord.load, tmp_path / "val")


def test_a_subset_is_another_split_of_the_same_network(hand):
    some = hand.subset(np.array([3, 1]), "val", "odd ones")
    assert len(some) == 2
    assert np.array_equal(some.logits, hand.logits[[3, 1]])
    assert (some.info.split, some.info.split_hash) == ("val", "odd ones")
    assert dataclasses.replace(some.info, split="val", split_hash="hash of val") == hand.info


def test_a_subset_has_its_own_targets(make_record):
    stored = make_record(np.zeros((3, 2, 4)), [3, 1, 2])
    assert stored.subset(np.array([2, 0]), "test", "h").targets.tolist() == [2, 3]


def test_exit_logits_are_those_of_one_exit(hand):
    assert torch.equal(hand.exit_logits(1), torch.from_numpy(hand.logits)[:, 1])


def batches_of(images, targets, size):
    """The images in batches, with their targets."""
    return zip(images.split(size), targets.split(size), strict=True)


def test_a_record_holds_the_logits_of_every_exit(tiny_net, images, targets, hand):
    made = record(
        tiny_net, batches_of(images[:10], targets[:10], 4), 10, hand.info, CPU, torch.no_grad
    )
    with torch.no_grad():
        logits = torch.stack(tiny_net(images[:10]), dim=1)
    assert made.logits.shape == (10, 4, 4)
    # eight layers, of at most 64 channels and 3x3 kernels
    assert_close(torch.from_numpy(made.logits), logits, terms=8 * 64 * 9)
    assert np.array_equal(made.targets, targets[:10].numpy())


def test_recording_uses_eval_mode_and_changes_nothing(tiny_net, images, targets, hand):
    before = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    tiny_net.train()
    record(tiny_net, batches_of(images[:8], targets[:8], 4), 8, hand.info, CPU, torch.no_grad)
    assert all(torch.equal(value, before[key]) for key, value in tiny_net.state_dict().items())


@pytest.mark.parametrize("mapped", [False, True])
def test_a_record_may_be_written_batch_by_batch(
    tiny_net, images, targets, hand, tmp_path, monkeypatch, mapped
):
    def make(directory):
        batches = batches_of(images[:8], targets[:8], 4)
        return record(tiny_net, batches, 8, hand.info, CPU, torch.no_grad, directory)

    bytes_needed = 8 * 4 * 4 * 4 + 128  # logits, and what a file of numpy begins with
    monkeypatch.setattr(records, "MAPPED_BYTES", bytes_needed - mapped)
    written, in_memory = make(tmp_path / "val"), make(None)
    assert isinstance(written.logits, np.memmap) == mapped
    assert np.array_equal(written.logits, in_memory.logits)
    assert np.array_equal(written.targets, in_memory.targets)
    assert written.info == hand.info
    assert [path.name for path in tmp_path.iterdir()] == ["val"]


def test_recording_that_fails_keeps_the_earlier_record(tiny_net, images, targets, hand, tmp_path):
    hand.save(tmp_path / "val")
    message = refusal(
        record,
        tiny_net,
        batches_of(images[:8], targets[:8], 4),
        9,
        hand.info,
        CPU,
        torch.no_grad,
        tmp_path / "val",
    )
    assert "1 of 9 images of val" in message
    assert np.array_equal(ExitRecord.load(tmp_path / "val").logits, hand.logits)


def test_a_subset_of_a_mapped_record_is_not_copied(stored, tmp_path, monkeypatch):
    stored.save(tmp_path / "all")
    monkeypatch.setattr(records, "MAPPED_BYTES", -1)
    monkeypatch.setattr(records, "CHUNK_BYTES", 300 * stored.logits[0].nbytes)
    mapped = ExitRecord.load(tmp_path / "all")
    rows = np.random.default_rng(0).permutation(2048)[:700]
    some, again = mapped.subset(rows, "test", "some"), rows[[5, 600, 7]]
    assert some.logits is mapped.logits
    policy = Policy(exit_names=stored.info.exit_names, thresholds=(0.6,) * 3)
    expected = stored.subset(rows, "test", "some")
    scores = [torch.from_numpy(score_record(part, policy).scores) for part in (some, expected)]
    assert_close(*scores, terms=64)
    assert torch.equal(some.exit_logits(1), expected.exit_logits(1))
    some.save(tmp_path / "some")
    saved = ExitRecord.load(tmp_path / "some")
    assert np.array_equal(saved.logits, expected.logits)
    assert np.array_equal(saved.targets, expected.targets)
    fewer = some.subset(np.array([5, 600, 7]), "test", "three")
    assert torch.equal(fewer.exit_logits(0), torch.from_numpy(stored.logits[again, 0]))
    right = replayed_live(some, policy)
    wrong = dataclasses.replace(right, answers=(right.answers + 1) % 4)
    for either in (some, expected):
        found = disagreements(either, policy, wrong)
        assert found.differs.all()
        assert found.unexplained.sum() == disagreements(expected, policy, wrong).unexplained.sum()


def anonymous_memory() -> int:
    """Bytes of this process that are not pages of a file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_choosing_on_a_large_record_takes_little_memory(hand, tmp_path):
    count, exits, classes = 20_000, 3, 1000
    logits = np.lib.format.open_memmap(
        tmp_path / "logits.npy", "w+", np.float32, (count, exits, classes)
    )
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, count)
    for rows in np.array_split(np.arange(count), 40):
        logits[rows] = rng.standard_normal((len(rows), exits, classes), np.float32)
        logits[rows, :, targets[rows]] += rng.uniform(0, 9, (len(rows), 1)).astype(np.float32)
    logits.flush()
    info = dataclasses.replace(hand.info, exit_names=("a", "b", "final"))
    mapped = ExitRecord(np.load(tmp_path / "logits.npy", mmap_mode="c"), targets, info)
    cost = Cost(("a", "b", "final"), (10, 10, 10), (1, 1, 0), 1, (1, 1, 0))
    before, most, over = anonymous_memory(), [0], threading.Event()

    def watch():
        while not over.wait(0.002):
            most[0] = max(most[0], anonymous_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    policy = choose(mapped, MaxDrop(0.005), cost)
    over.set()
    watching.join()
    assert 0 < policy.thresholds[0] < 1
    assert most[0] - before < 0.5 * logits.nbytes  # of 240 MB; a copy alone would be all


def test_with_many_classes_the_best_five_count(make_record):
    logits = np.zeros((3, 2, 12))
    logits[:, :, :6] = [6, 5, 4, 3, 2, 1]  # classes in the order of their logits
    stored = make_record(logits, [0, 4, 5])
    policy = Policy(exit_names=("exit0", "final"), thresholds=(0.5,))
    assert score_record(stored, policy).in_top5.tolist() == [[True] * 2, [True] * 2, [False] * 2]
    few = make_record(logits[:, :, :10], [0, 4, 5])
    assert score_record(few, policy).in_top5 is None


def test_more_images_than_announced_are_refused(tiny_net, images, targets, hand):
    with pytest.raises(RuntimeError, match=r"\b7\b.*\b8\b"):
        record(tiny_net, batches_of(images[:8], targets[:8], 4), 7, hand.info, CPU, torch.no_grad)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_logits_that_are_not_finite_are_refused(tiny_net, images, targets, hand, bad):
    with torch.no_grad():
        list(tiny_net.heads["layer1"].parameters())[-1].fill_(bad)
    batches = batches_of(images[:60], targets[:60], 20)
    info = dataclasses.replace(hand.info, exit_names=tiny_net.exit_names, precision="bf16")
    message = refusal(record, tiny_net, batches, 60, info, torch.device("cpu"), nullcontext)
    for part in ("layer1", "not finite", "20 of 20", "val", "torch", "bf16", "--amp off"):
        assert part in message


class TestRuntimes:
    """A record of a network in a runtime."""

    def recorded(self, network, images, targets, info, batch=100):
        batches = batches_of(images, targets, batch)
        return record(network, batches, len(images), info, CPU, nullcontext)

    @pytest.fixture
    def info(self, hand, tiny_net):
        return dataclasses.replace(hand.info, exit_names=tiny_net.exit_names)

    def test_in_eager_torch_it_is_that_of_the_network_to_the_last_bit(
        self, tiny_net, images, targets, info
    ):
        some, their = images[:300], targets[:300]
        expected = self.recorded(tiny_net, some, their, info)
        found = self.recorded(in_torch(tiny_net, some[:2]), some, their, info)
        assert np.array_equal(found.logits, expected.logits)
        assert np.array_equal(found.targets, expected.targets)
        assert found.info == expected.info

    def test_temperatures_and_criteria_of_no_policy_are_in_it(self, tiny_net, images):
        with torch.no_grad():
            expected = tiny_net(images[:5])
        for ours, theirs in zip(in_torch(tiny_net, images[:2])(images[:5]), expected, strict=True):
            assert torch.equal(ours, theirs)

    def test_precision_and_runtime_are_named_if_logits_are_not_finite(
        self, tiny_net, images, targets, info
    ):
        with torch.no_grad():
            list(tiny_net.heads["layer1"].parameters())[-1].fill_(float("nan"))
        other = dataclasses.replace(info, runtime="openvino-bf16", precision="bf16")
        network = in_torch(tiny_net, images[:2])
        message = refusal(self.recorded, network, images[:20], targets[:20], other)
        for part in ("openvino-bf16", "precision bf16", "--runtime"):
            assert part in message
        exact = dataclasses.replace(info, runtime="onnxruntime", precision="f32")
        assert "too low" not in refusal(self.recorded, network, images[:20], targets[:20], exact)

    def test_one_of_before_there_were_runtimes_is_of_torch(self, hand, tmp_path):
        hand.save(tmp_path / "old")
        path = tmp_path / "old" / "info.json"
        values = json.loads(path.read_text())
        del values["runtime"]
        path.write_text(json.dumps(values))
        assert ExitRecord.load(tmp_path / "old").info == hand.info
        assert hand.info.runtime == "torch"
