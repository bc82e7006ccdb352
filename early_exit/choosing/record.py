"""The exit record: the logits of every exit for every image of a split.

Every question about thresholds is answered from it, without the network.
"""

import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from early_exit.errors import UserError
from early_exit.inference.policy import Policy
from early_exit.inference.runtimes.network import RuntimeNetwork
from early_exit.metrics import MANY_CLASSES, in_top5
from early_exit.model.cost import Cost
from early_exit.model.network import MultiExitNetwork
from early_exit.system.directories import atomic_directory
from early_exit.system.disk_errors import UNSUPPORTED, write_errors
from early_exit.system.files import atomic_file, reserve, write_text

MAPPED_BYTES = 64 << 20  # the logits of a larger record are memory-mapped
NO_MAPS = (*UNSUPPORTED, errno.ENODEV)
CHUNK_BYTES = 8 << 20  # logits read at once, so that a mapped record never fills the memory


@dataclass(frozen=True)
class RecordInfo:
    """Where a record comes from. Records of the same weights, images and precision have equal
    ones."""

    split: str
    split_hash: str
    """Hash of the images (`early_exit.data.base.Data.digest`)."""
    exit_names: tuple[str, ...]
    stage_macs: tuple[int, ...]
    head_macs: tuple[int, ...]
    precision: str
    """Of eager torch: bf16, fp16, or off for float32; in another runtime also f32 and int8."""
    weights: str
    """Hash of the network's weights, and which they are, such as those of the last epoch."""
    device: str
    left_out: tuple[int, ...] = ()
    """The images of the split that could not be read, by their index in it; the record's images are
    the others, in order."""
    left_out_names: tuple[str, ...] = ()
    """Their files."""
    runtime: str = "torch"
    """What ran the network (`early_exit.inference.runtimes`)."""
    calibration: str = ""
    """Of 8-bit integers, the hash of train, from whose images the ranges of values come."""
    preparation: str = ""
    """How the images were made of files; empty for images in memory, and in records of an older
    version."""
    packages: tuple[str, ...] = ()
    """The packages that gave the logits, with their versions, such as `torch 2.14.1`; empty in
    records of an older version."""


@dataclass(frozen=True)
class ExitRecord:
    """Logits of every exit for every image of a split.

    logits: (images, exits, classes) float32, memory-mapped if large; targets: (images,) int64;
    rows: (images,) if this is a subset of a mapped record, the indices of its images in `logits`.
    """

    logits: np.ndarray
    targets: np.ndarray
    info: RecordInfo
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int:
        """The number of logits of an exit."""
        return self.logits.shape[2]

    @property
    def cost(self) -> Cost:
        """The network's cost in MACs. A record does not have the numbers of parameters, so they
        are 0."""
        info, no_params = self.info, (0,) * len(self.info.exit_names)
        return Cost(info.exit_names, info.stage_macs, info.head_macs, 0, no_params)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """All images in chunks: the slice of the record, and its logits (chunk, exits, classes)."""
        size = max(1, CHUNK_BYTES // (4 * self.logits.shape[1] * self.num_classes))
        for start in range(0, len(self), size):
            chunk = slice(start, min(start + size, len(self)))
            rows = chunk if self.rows is None else self.rows[chunk]
            yield chunk, torch.from_numpy(np.array(self.logits[rows]))

    def subset(self, indices: np.ndarray, split: str, split_hash: str) -> "ExitRecord":
        """The images at `indices` as the record of another split. Mapped logits are not copied."""
        info = replace(
            self.info, split=split, split_hash=split_hash, left_out=(), left_out_names=()
        )
        targets = self.targets[indices]
        if isinstance(self.logits, np.memmap):
            rows = indices if self.rows is None else self.rows[indices]
            return ExitRecord(self.logits, targets, info, rows)
        return ExitRecord(self.logits[indices], targets, info)

    def exit_logits(self, exit_index: int) -> Tensor:
        """The logits of one exit, (images, classes). For a mapped record that is not a subset, they
        are a view of the file."""
        rows = slice(None) if self.rows is None else self.rows
        return torch.from_numpy(self.logits[rows, exit_index])

    def save(self, directory: Path | str) -> None:
        """Writes the record as a directory, whole or not at all."""
        with atomic_directory(Path(directory)) as partial:
            rows = slice(None) if self.rows is None else self.rows
            _save_array(partial / "logits.npy", self.logits[rows])
            _write_targets_and_info(partial, self.targets, self.info)

    @classmethod
    def load(cls, directory: Path | str) -> "ExitRecord":
        """Reads what `save` wrote; large logits are memory-mapped. Raises UserError if a file is
        missing or torn."""
        directory = Path(directory)
        try:
            info = json.loads((directory / "info.json").read_text("utf-8"))
            info = {k: tuple(v) if isinstance(v, list) else v for k, v in info.items()}
            large = (directory / "logits.npy").stat().st_size > MAPPED_BYTES
            logits = _load_array(directory / "logits.npy", large)
            return cls(logits, np.load(directory / "targets.npy"), RecordInfo(**info))
        except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{directory} is not a complete exit record ({error})") from None


def _write_targets_and_info(partial: Path, targets: np.ndarray, info: RecordInfo) -> None:
    _save_array(partial / "targets.npy", targets)
    write_text(partial / "info.json", json.dumps(asdict(info), indent=2) + "\n")


def record(
    network: MultiExitNetwork | RuntimeNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    info: RecordInfo,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    directory: Path | None = None,
    unreadable: Callable[[], Mapping[int, str]] = dict,
) -> ExitRecord:
    """Runs every exit on `count` images and stores the logits, in memory or in a `directory`, which
    is written whole or not at all.

    batches: images (B, C, H, W) and targets (B,). unreadable: called after them, gives the images
    of the split that they left out, the name of each by its index. Raises UserError if the batches
    have fewer than `count` images and that does not explain it; and if logits are not finite.
    """
    shape = (count, network.num_exits, network.num_classes)
    if directory is None:
        blank = ExitRecord(np.empty(shape, np.float32), np.empty(count, np.int64), info)
        recorded = _fill(blank, network, batches, device, autocast)
        info = _leaving_out(unreadable(), blank, recorded)
        return ExitRecord(blank.logits[:recorded], blank.targets[:recorded], info)
    with atomic_directory(directory) as partial:
        with write_errors(directory):
            logits = _mapped(partial / "logits.npy", shape)
        blank = ExitRecord(logits, np.empty(count, np.int64), info)
        recorded = _fill(blank, network, batches, device, autocast)
        info = _leaving_out(unreadable(), blank, recorded)
        if isinstance(logits, np.memmap) and recorded == count:
            with write_errors(directory):
                logits.flush()
        else:
            _save_array(partial / "logits.npy", logits[:recorded])
        _write_targets_and_info(partial, blank.targets[:recorded], info)
    return ExitRecord.load(directory)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file, memory-mapped, or in memory if the file system has no memory maps."""
    try:
        logits = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    except OSError as error:
        if error.errno not in NO_MAPS:
            raise
        return np.empty(shape, np.float32)
    reserve(path)
    return logits


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_file(path) as file:
        np.save(file, array)


def _load_array(path: Path, mapped: bool) -> np.ndarray:
    """An array of a file. mapped: as a memory map, if the file system has them."""
    try:
        # copy-on-write: torch needs a writable array, and the file must not change
        return np.load(path, mmap_mode="c" if mapped else None)
    except OSError as error:
        if not mapped or error.errno not in NO_MAPS:
            raise
        return np.load(path)


def _fill(
    blank: ExitRecord,
    network: MultiExitNetwork | RuntimeNetwork,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> int:
    """Writes the logits and targets of the batches into a blank record; returns how many."""
    if isinstance(network, MultiExitNetwork):
        network.eval()
    start, count = 0, len(blank)
    with torch.inference_mode(), autocast():
        for images, target in batches:
            rows = slice(start, start + len(target))
            if rows.stop > count:
                raise RuntimeError(
                    f"expected {count} images of {blank.info.split}, the batches have at least"
                    f" {rows.stop}"
                )
            logits = torch.stack(network(images.to(device, non_blocking=True)), dim=1).float().cpu()
            _check_finite(logits, blank.info)
            blank.logits[rows] = logits.numpy()
            blank.targets[rows] = target.cpu().numpy()
            start = rows.stop
    return start


def _leaving_out(unreadable: Mapping[int, str], blank: ExitRecord, recorded: int) -> RecordInfo:
    """The info of a record without the unreadable images, whose first `recorded` rows are filled.
    Raises UserError if that is not all of them, or none."""
    count, split = len(blank), blank.info.split
    if recorded == count:
        return blank.info
    if recorded + len(unreadable) != count or not recorded:
        raise UserError(
            f"{count - recorded} of {count} images of {split} could not be read, and"
            f" the log names {len(unreadable)} of them; replace these files"
        )
    rows = sorted(unreadable)
    names = tuple(unreadable[row] for row in rows)
    return replace(blank.info, left_out=tuple(rows), left_out_names=names)


def _check_finite(logits: Tensor, info: RecordInfo) -> None:
    """Raises UserError if logits (B, exits, K) are not finite."""
    bad = ~logits.isfinite().all(dim=2)
    if bad.any():
        name = info.exit_names[int(bad.any(dim=0).nonzero()[0])]
        exact = info.precision in ("off", "f32")
        flag = "--amp off" if info.runtime == "torch" else "another --runtime"
        advice = "" if exact else f", or the precision is too low; try {flag}"
        raise UserError(
            f"the logits of the exit {name} are not finite for {int(bad.any(dim=1).sum())} of"
            f" {len(bad)} images of {info.split} ({info.runtime}, precision {info.precision}): the"
            f" weights have diverged{advice}"
        )


@dataclass(frozen=True)
class Scores:
    """The scores and answers of every exit for every image of a record: all that thresholds are
    chosen from.

    scores: (images, exits) float32; those of the final exit decide nothing; answers: (images,
    exits) the class each exit answers; targets: (images,); in_top5: (images, exits) whether the
    target is among the five most probable classes, None with few classes.
    """

    scores: np.ndarray
    answers: np.ndarray
    targets: np.ndarray
    in_top5: np.ndarray | None = None

    @property
    def correct(self) -> np.ndarray:
        """Whether the answer of each exit is correct, (images, exits) bool."""
        return self.answers == self.targets[:, None]

    def exit_index(self, policy: Policy) -> np.ndarray:
        """The exit each image takes, (images,), by `policy`'s thresholds and enabled exits."""
        exits = np.ones(self.scores.shape, bool)
        for index in range(policy.num_exits - 1):
            exits[:, index] = policy.is_enabled(index) & policy.exits(index, self.scores[:, index])
        return exits.argmax(axis=1)


def score_record(record: ExitRecord, policy: Policy) -> Scores:
    """Scores and answers of every exit of a record, by a policy's criterion, temperatures and
    enabled exits; its thresholds have no effect. A disabled exit has the score -inf.

    Raises UserError for a policy of other exits.
    """
    policy.check_exits(record.info.exit_names, "the record")
    shape = (len(record), policy.num_exits)
    scores = np.full(shape, -np.inf, np.float32)
    answers = np.zeros(shape, np.int64)
    top5 = np.zeros(shape, bool) if record.num_classes > MANY_CLASSES else None
    for rows, logits in record.chunks():
        target = torch.from_numpy(record.targets[rows])
        state = None
        for index in range(policy.num_exits):
            if policy.is_enabled(index):
                answer, score, state = policy.score(index, logits[:, index], state)
                scores[rows, index] = score.numpy()
                answers[rows, index] = answer.argmax(dim=-1).numpy()
                if top5 is not None:
                    top5[rows, index] = in_top5(answer, target).numpy()
    return Scores(scores, answers, record.targets, top5)
