"""The journal of a run: one record per epoch, in metrics.jsonl, in the log and in TensorBoard."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit.errors import UserError
from early_exit.system.disk_errors import write_errors
from early_exit.system.files import write_text
from early_exit.system.text import shortened

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What one epoch gave; its fields are the keys in metrics.jsonl."""

    phase: str
    phase_index: int
    epoch: int
    """Of the phase, from 0."""
    epochs: int
    """Of the whole phase."""
    lr: float
    """Learning rate of the last step."""
    train_loss: float
    train_top1: dict[str, float]
    """Accuracy of each exit on the augmented images, during the epoch."""
    seconds: float
    """Of training, without val."""
    images_per_second: float
    val_loss: float
    val_top1: dict[str, float]
    val_top5: dict[str, float] | None
    """None, and not written, if there are too few classes."""
    peak_memory: int
    """Bytes."""

    def as_dict(self) -> dict[str, object]:
        """The keys and values in metrics.jsonl."""
        return {key: value for key, value in vars(self).items() if value is not None}


def summary_writer() -> Any:
    """TensorBoard's writer. Raises UserError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs the package tensorboard; run: pip install -r requirements.txt"
        ) from None
    return SummaryWriter


class Journal:
    """The records of a run; a context manager.

    start: (phase, epoch). Opening the journal drops the records from there on, because a resumed
    run writes them again.
    """

    def __init__(self, directory: Path, start: tuple[int, int], tensorboard: bool) -> None:
        self.directory, self.start, self.tensorboard = directory, start, tensorboard
        self.path = directory / "metrics.jsonl"
        self.writer: Any = None

    def __enter__(self) -> "Journal":
        lines = []
        text = self.path.read_text("utf-8", "replace") if self.path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError):  # the last line may be incomplete
                record = json.loads(line)
                if (record["phase_index"], record["epoch"]) < self.start:
                    lines.append(line + "\n")
        write_text(self.path, "".join(lines))
        self.count = len(lines)
        if self.tensorboard:
            make_writer = summary_writer()
            with self._tensorboard_may_fail():
                place = str(self.directory / "tensorboard")
                self.writer = make_writer(place, purge_step=self.count)
        return self

    def __exit__(self, *_: object) -> None:
        with self._tensorboard_may_fail():
            if self.writer:
                self.writer.close()

    def write(self, record: EpochRecord) -> None:
        """Appends the record of an epoch."""
        line = json.dumps(record.as_dict()) + "\n"
        with write_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        log.info(
            "%s %d/%d: lr %.4f, loss %.4f, val %s%s, %.0f images/s, peak %.2f GiB",
            record.phase,
            record.epoch + 1,
            record.epochs,
            record.lr,
            record.train_loss,
            percents(record.val_top1),
            f"; top 5 {percents(record.val_top5)}" if record.val_top5 else "",
            record.images_per_second,
            record.peak_memory / 2**30,
        )
        with self._tensorboard_may_fail():
            if self.writer:
                self._write_scalars(record)
        self.count += 1

    def _write_scalars(self, record: EpochRecord) -> None:
        for key, value in record.as_dict().items():
            if isinstance(value, dict):
                for name, number in value.items():
                    self.writer.add_scalar(f"{key}/{name}", number, self.count)
            elif isinstance(value, float):
                self.writer.add_scalar(key, value, self.count)
        self.writer.flush()

    @contextlib.contextmanager
    def _tensorboard_may_fail(self) -> Iterator[None]:
        """TensorBoard decorates a run: if it fails, the run goes on without it."""
        try:
            yield
        except Exception as error:  # its writer is a thread of another library
            self.writer = None
            reason = shortened(error, 200) or type(error).__name__
            log.warning("training goes on without TensorBoard: %s", reason)


def percents(accuracy: Mapping[str, float]) -> str:
    """`layer1 81.20 %, final 91.00 %`."""
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in accuracy.items())
