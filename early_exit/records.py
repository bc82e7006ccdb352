"""The exit record: what every exit said about every image of a split.

Every question about thresholds is answered from it, without the network.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from early_exit.checkpoint import write_text
from early_exit.errors import UserError
from early_exit.network import MultiExitNetwork
from early_exit.policy import Policy

MAPPED_BYTES = 64 << 20  # records larger than this stay on the disk and are mapped
CHUNK = 8192  # images scored at a time, so that a mapped record never lies in memory whole


@dataclass(frozen=True)
class RecordInfo:
    """Where a record comes from; two of the same weights, images and precision are equal."""

    split: str
    split_hash: str
    exit_names: tuple[str, ...]
    stage_macs: tuple[int, ...]
    head_macs: tuple[int, ...]
    precision: str
    weights: str
    """Hash of the network's weights, and which they are (of the last epoch)."""
    device: str


@dataclass(frozen=True)
class ExitRecord:
    """Logits of every exit for every image of a split.

    logits: (images, exits, classes) float32; targets: (images,) int64.
    """

    logits: np.ndarray
    targets: np.ndarray
    info: RecordInfo

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: np.ndarray, split: str, split_hash: str) -> "ExitRecord":
        """The images at `indices` as the record of another split."""
        info = RecordInfo(**{**vars(self.info), "split": split, "split_hash": split_hash})
        return ExitRecord(self.logits[indices], self.targets[indices], info)

    def exit_logits(self, exit_index: int) -> Tensor:
        """(images, classes) of one exit."""
        return torch.from_numpy(np.ascontiguousarray(self.logits[:, exit_index]))

    def save(self, directory: Path) -> None:
        """Writes the record as a directory that appears whole."""
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        np.save(partial / "logits.npy", self.logits)
        np.save(partial / "targets.npy", self.targets)
        write_text(partial / "info.json", json.dumps(asdict(self.info), indent=2) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)

    @classmethod
    def load(cls, directory: Path) -> "ExitRecord":
        """Reads what `save` wrote; a large one is mapped, not read."""
        try:
            info = json.loads((directory / "info.json").read_text())
            info = {k: tuple(v) if isinstance(v, list) else v for k, v in info.items()}
            large = (directory / "logits.npy").stat().st_size > MAPPED_BYTES
            logits = np.load(directory / "logits.npy", mmap_mode="r" if large else None)
            return cls(logits, np.load(directory / "targets.npy"), RecordInfo(**info))
        except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{directory} is not a whole exit record ({error})") from None


def record(
    network: MultiExitNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    info: RecordInfo,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    spill: Path | None = None,
) -> ExitRecord:
    """Runs every exit on `count` images and keeps what each said.

    spill: a file that the logits are written into as they come, where they would be large.
    """
    shape = (count, network.num_exits, network.num_classes)
    if spill is not None and np.prod(shape) * 4 > MAPPED_BYTES:
        logits = np.lib.format.open_memmap(spill, "w+", np.float32, shape)
    else:
        logits = np.empty(shape, np.float32)
    targets = np.empty(count, np.int64)
    network.eval()
    start = 0
    with torch.inference_mode(), autocast():
        for images, target in batches:
            rows = slice(start, start + len(target))
            if rows.stop > count:
                raise RuntimeError(f"the split gave {rows.stop} images, {count} were announced")
            said = network(images.to(device, non_blocking=True))
            logits[rows] = torch.stack(said, dim=1).float().cpu().numpy()
            targets[rows] = target.cpu().numpy()
            start += len(target)
    if start != count:
        raise RuntimeError(f"the split gave {start} images, {count} were announced")
    return ExitRecord(logits, targets, info)


@dataclass(frozen=True)
class Scores:
    """What a criterion makes of a record: all that thresholds are chosen from.

    scores: (images, exits) float32, those of the final exit unused in deciding; answers: (images,
    exits) the class each exit would answer; targets: (images,).
    """

    scores: np.ndarray
    answers: np.ndarray
    targets: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether each exit answers each image rightly, (images, exits) bool."""
        return self.answers == self.targets[:, None]

    def exit_index(self, policy: Policy) -> np.ndarray:
        """The exit each image takes under `policy`'s thresholds and switches, (images,)."""
        leaves = np.ones(self.scores.shape, bool)
        for exit_index in range(policy.num_exits - 1):
            scores = torch.from_numpy(np.ascontiguousarray(self.scores[:, exit_index]))
            leaves[:, exit_index] = policy.is_on(exit_index) & policy.leaves(exit_index, scores)
        return leaves.argmax(axis=1)


def score_record(record: ExitRecord, policy: Policy) -> Scores:
    """Scores and answers of every exit of a record under a policy's criterion, temperatures and
    switches; its thresholds play no part."""
    count, num_exits, _ = record.logits.shape
    scores = np.full((count, num_exits), -np.inf, np.float32)
    answers = np.zeros((count, num_exits), np.int64)
    for start in range(0, count, CHUNK):
        rows = slice(start, start + CHUNK)
        chunk = torch.from_numpy(np.array(record.logits[rows]))  # (chunk, exits, classes)
        state = None
        for exit_index in range(num_exits):
            if policy.is_on(exit_index):
                answer, score, state = policy.score(exit_index, chunk[:, exit_index], state)
                scores[rows, exit_index] = score.numpy()
                answers[rows, exit_index] = answer.argmax(dim=-1).numpy()
    return Scores(scores, answers, record.targets)


@dataclass(frozen=True)
class Replay:
    """What a policy does on a record: per image the class answered and the exit taken."""

    answers: np.ndarray
    exit_index: np.ndarray


def replay(record: ExitRecord, policy: Policy) -> Replay:
    """The policy on stored logits: what live inference would answer, and where."""
    scored = score_record(record, policy)
    exit_index = scored.exit_index(policy)
    return Replay(scored.answers[np.arange(len(exit_index)), exit_index], exit_index)


def disagreements(
    record: ExitRecord, policy: Policy, answers: np.ndarray, exit_index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where live inference (answers and exits, (images,)) differs from the policy's replay.

    Returns two (images,) masks: the images that differ, and those of them that rounding does not
    explain: at every exit met, the score is further than 1e-5 from the threshold and the best
    class further than 1e-5 ahead of the second.
    """
    scored = score_record(record, policy)
    taken = scored.exit_index(policy)
    differs = (scored.answers[np.arange(len(taken)), taken] != answers) | (taken != exit_index)
    unexplained = np.zeros_like(differs)
    for row in np.flatnonzero(differs):
        met = [i for i in range(max(taken[row], exit_index[row]) + 1) if policy.is_on(i)]
        second, best = np.sort(record.logits[row, met], axis=-1)[:, -2:].T
        early = [i for i in met if i < policy.num_exits - 1]
        if policy.criterion == "patience":
            early = []  # its scores are counts: exact, but for a tie
        slack = [abs(scored.scores[row, i] - policy.thresholds[i]) for i in early]
        unexplained[row] = min([*slack, *(best - second)]) > 1e-5
    return differs, unexplained
