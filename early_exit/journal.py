"""The journal of a run: a record an epoch, in metrics.jsonl, on the screen and in TensorBoard."""

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from early_exit.disk import write_text, writing
from early_exit.errors import UserError

log = logging.getLogger(__name__)


class Journal:
    """Open as a context; `before`: (phase, epoch), records from there on are dropped, because a
    resumed run makes them again."""

    def __init__(self, directory: Path, before: tuple[int, int], tensorboard: bool) -> None:
        self.directory, self.before, self.tensorboard = directory, before, tensorboard
        self.path = directory / "metrics.jsonl"
        self.writer = None

    def __enter__(self) -> "Journal":
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError, KeyError):  # a torn last line
                record = json.loads(line)
                if (record["phase_index"], record["epoch"]) < self.before:
                    kept.append(line + "\n")
        write_text(self.path, "".join(kept))
        self.count = len(kept)
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "--tensorboard needs the package; run: pip install -r requirements.txt"
                ) from None
            self.writer = SummaryWriter(str(self.directory / "tensorboard"), purge_step=self.count)
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def write(self, record: dict[str, Any]) -> None:
        """Appends the record of an epoch everywhere it goes."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        log.info(
            "%s %d/%d: lr %.4f, loss %.4f, val %s%s, %.0f images/s, peak %.2f GiB",
            record["phase"], record["epoch"] + 1, record["epochs"], record["lr"],
            record["train_loss"], percents(record["val_top1"]),
            f"; top 5 {percents(record['val_top5'])}" if "val_top5" in record else "",
            record["images_per_second"], record["peak_memory"] / 2**30,
        )
        if self.writer:
            for key, value in record.items():
                if isinstance(value, dict):
                    for name, number in value.items():
                        self.writer.add_scalar(f"{key}/{name}", number, self.count)
                elif isinstance(value, float):
                    self.writer.add_scalar(key, value, self.count)
            self.writer.flush()
        self.count += 1


def percents(accuracy: Mapping[str, float]) -> str:
    """`layer1 81.20 %, final 91.00 %`."""
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in accuracy.items())
