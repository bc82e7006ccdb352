"""The exit record: what every exit said about every image of a split.

Every question about thresholds is answered from it, without the network.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from early_exit.cost import Cost
from early_exit.disk import made_whole, write_text
from early_exit.errors import UserError
from early_exit.metrics import MANY_CLASSES, among5
from early_exit.network import MultiExitNetwork
from early_exit.policy import Policy

MAPPED_BYTES = 64 << 20  # records larger than this stay on the disk and are mapped
CHUNK_BYTES = 8 << 20  # of logits looked at at once, so that a mapped record is never in memory


@dataclass(frozen=True)
class RecordInfo:
    """Where a record comes from; two of the same weights, images and precision are equal."""

    split: str
    split_hash: str
    """What the split holds, as the data says (`Data.digest`)."""
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

    logits: (images, exits, classes) float32, perhaps mapped; targets: (images,) int64; rows: of a
    part of a mapped record, where its images are in `logits`.
    """

    logits: np.ndarray
    targets: np.ndarray
    info: RecordInfo
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int:
        """How many logits an exit gives."""
        return self.logits.shape[2]

    @property
    def cost(self) -> Cost:
        """The network's price in MACs; its parameters are not in a record and count 0."""
        info, none = self.info, (0,) * len(self.info.exit_names)
        return Cost(info.exit_names, info.stage_macs, info.head_macs, 0, none)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """All images, some at a time: which, and their logits (some, exits, classes)."""
        size = max(1, CHUNK_BYTES // (4 * self.logits.shape[1] * self.num_classes))
        for start in range(0, len(self), size):
            chosen = slice(start, min(start + size, len(self)))
            yield chosen, torch.from_numpy(np.array(self._read(chosen)))

    def _read(self, chosen: slice) -> np.ndarray:
        return self.logits[chosen if self.rows is None else self.rows[chosen]]

    def subset(self, indices: np.ndarray, split: str, split_hash: str) -> "ExitRecord":
        """The images at `indices` as the record of another split; a mapped one is not copied."""
        info = RecordInfo(**{**vars(self.info), "split": split, "split_hash": split_hash})
        targets = self.targets[indices]
        if isinstance(self.logits, np.memmap):
            rows = indices if self.rows is None else self.rows[indices]
            return ExitRecord(self.logits, targets, info, rows)
        return ExitRecord(self.logits[indices], targets, info)

    def exit_logits(self, exit_index: int) -> Tensor:
        """(images, classes) of one exit; of a whole mapped record a view of the file."""
        rows = slice(None) if self.rows is None else self.rows
        return torch.from_numpy(self.logits[rows, exit_index])

    def save(self, directory: Path | str) -> None:
        """Writes the record as a directory that appears whole."""
        with made_whole(Path(directory)) as partial:
            np.save(partial / "logits.npy", self.logits)
            _write_rest(partial, self.targets, self.info)

    @classmethod
    def load(cls, directory: Path | str) -> "ExitRecord":
        """Reads what `save` wrote; a large one is mapped, not read."""
        directory = Path(directory)
        try:
            info = json.loads((directory / "info.json").read_text())
            info = {k: tuple(v) if isinstance(v, list) else v for k, v in info.items()}
            large = (directory / "logits.npy").stat().st_size > MAPPED_BYTES
            # c: torch wants what it could write to; nobody does, and the file would not change
            logits = np.load(directory / "logits.npy", mmap_mode="c" if large else None)
            return cls(logits, np.load(directory / "targets.npy"), RecordInfo(**info))
        except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{directory} is not a whole exit record ({error})") from None


def _write_rest(partial: Path, targets: np.ndarray, info: RecordInfo) -> None:
    np.save(partial / "targets.npy", targets)
    write_text(partial / "info.json", json.dumps(asdict(info), indent=2) + "\n")


def record(
    network: MultiExitNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    info: RecordInfo,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    directory: Path | None = None,
) -> ExitRecord:
    """Runs every exit on `count` images and keeps what each said: in memory, or written as it comes
    into a `directory`, which appears whole.

    Raises UserError where the batches hold fewer images: a record that leaves out what could not be
    read would be a record of another split.
    """
    shape = (count, network.num_exits, network.num_classes)
    if directory is None:
        made = ExitRecord(np.empty(shape, np.float32), np.empty(count, np.int64), info)
        _fill(made, network, batches, device, autocast)
        return made
    with made_whole(directory) as partial:
        logits = np.lib.format.open_memmap(partial / "logits.npy", "w+", np.float32, shape)
        _claim(partial / "logits.npy")
        made = ExitRecord(logits, np.empty(count, np.int64), info)
        _fill(made, network, batches, device, autocast)
        logits.flush()
        _write_rest(partial, made.targets, info)
    return ExitRecord.load(directory)


def _claim(path: Path) -> None:
    """Makes the disk give a mapped file its room now: later a full one would end the process."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _fill(made: ExitRecord, network, batches, device, autocast) -> None:
    """Writes what every exit says about the batches into a blank record."""
    network.eval()
    start, count = 0, len(made)
    with torch.inference_mode(), autocast():
        for images, target in batches:
            rows = slice(start, start + len(target))
            if rows.stop > count:
                raise RuntimeError(f"the split gave {rows.stop} images, {count} were announced")
            said = network(images.to(device, non_blocking=True))
            said = torch.stack(said, dim=1).float().cpu()
            _refuse_infinite(said, made.info)
            made.logits[rows] = said.numpy()
            made.targets[rows] = target.cpu().numpy()
            start += len(target)
    if start != count:
        raise UserError(
            f"{count - start} of {count} images of {made.info.split} could not be read, and a"
            " record holds all; put readable ones in the place of those named above"
        )


def _refuse_infinite(logits: Tensor, info: RecordInfo) -> None:
    """Raises UserError where an exit's logits (B, exits, K) are no numbers to choose by."""
    bad = ~logits.isfinite().all(dim=2)
    if bad.any():
        name = info.exit_names[int(bad.any(dim=0).nonzero()[0])]
        raise UserError(
            f"the exit {name} says something that is not finite about {int(bad.any(dim=1).sum())}"
            f" of {len(bad)} images of {info.split} (amp {info.precision}): the weights have"
            " diverged"
            + ("" if info.precision == "off" else ", or the precision is too small; try --amp off")
        )


@dataclass(frozen=True)
class Scores:
    """What a criterion makes of a record: all that thresholds are chosen from.

    scores: (images, exits) float32, those of the final exit unused in deciding; answers: (images,
    exits) the class each exit would answer; targets: (images,); among5: (images, exits) whether the
    target is among the five likeliest classes, kept where there are many.
    """

    scores: np.ndarray
    answers: np.ndarray
    targets: np.ndarray
    among5: np.ndarray | None = None
    remembers: bool = False
    """Whether the criterion keeps a state, so that an exit would score otherwise without the ones
    before it."""

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
    switches; its thresholds play no part. Raises UserError for a policy of other exits."""
    policy.refuse_other_exits(record.info.exit_names, "the record")
    shape = (len(record), policy.num_exits)
    scores = np.full(shape, -np.inf, np.float32)
    answers = np.zeros(shape, np.int64)
    best5 = np.zeros(shape, bool) if record.num_classes > MANY_CLASSES else None
    state = None
    for rows, logits in record.chunks():
        target = torch.from_numpy(record.targets[rows])
        state = None
        for exit_index in range(policy.num_exits):
            if policy.is_on(exit_index):
                answer, score, state = policy.score(exit_index, logits[:, exit_index], state)
                scores[rows, exit_index] = score.numpy()
                answers[rows, exit_index] = answer.argmax(dim=-1).numpy()
                if best5 is not None:
                    best5[rows, exit_index] = among5(answer, target).numpy()
    return Scores(scores, answers, record.targets, best5, state is not None)


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
        at = row if record.rows is None else record.rows[row]
        second, best = np.sort(record.logits[at, met], axis=-1)[:, -2:].T
        early = [i for i in met if i < policy.num_exits - 1]
        if policy.criterion == "patience":
            early = []  # its scores are counts: exact, but for a tie
        slack = [abs(scored.scores[row, i] - policy.thresholds[i]) for i in early]
        unexplained[row] = min([*slack, *(best - second)]) > 1e-5
    return differs, unexplained
