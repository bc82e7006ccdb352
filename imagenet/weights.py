"""torchvision's trained weights, downloaded once."""

import hashlib
import re
from pathlib import Path

import torch
from torchvision import models

from early_exit.data.folders import FolderRun
from early_exit.errors import UserError
from early_exit.system.downloads import downloading
from early_exit.system.files import atomic_file
from early_exit.system.locks import locked
from imagenet import networks

WEIGHTS = Path(__file__).resolve().parent.parent / "data" / "weights"


def find(config: FolderRun, name: str, fetch: bool = True) -> Path:
    """The file of torchvision's weights for the configuration's network.

    name: of the weights; empty: the first ones that fit the image size. fetch: whether they are
    downloaded if they are missing. Raises UserError if there are no such weights, Unavailable if
    the download fails.
    """
    arch = config.model.arch
    networks.check_arch(arch)
    if name and ("/" in name or Path(name, "train").is_dir()):
        raise UserError(
            f"--pretrained got the directory {name} instead of the name of weights; put the"
            " directory before the flags"
        )
    known = {weights.name: weights for weights in models.get_model_weights(arch)}
    fitting = [
        weights.name
        for weights in known.values()
        if not arch.startswith("vit_") or weights.transforms().crop_size == [config.data.val_crop]
    ]
    if not name:
        name = next(iter(fitting), "")
    if name not in fitting:
        raise UserError(
            f"torchvision has no weights {name or 'of that size'} for {arch} at"
            f" {config.data.val_crop} pixels; it has {', '.join(known)}"
        )
    path = WEIGHTS / f"{arch}-{name}.pth"
    if path.exists() or not fetch:  # written whole, perhaps on a volume that is read-only here
        return path
    with locked(WEIGHTS, wait=True):  # several processes or runs may share the directory
        if not path.exists():
            _fetch(arch, known[name], path)
    return path


def _fetch(arch: str, weights: models.WeightsEnum, path: Path) -> None:
    """Downloads weights to `path`, or takes them from torch's cache.

    Raises UserError for a file in the cache that is not the expected one: torch verifies only what
    it downloads.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    instead = "download it elsewhere and pass it with --backbone FILE"
    with downloading(weights.url, instead):
        if cached.is_file() and not _is_named_by_its_hash(cached):
            raise UserError(
                f"{cached} is not what its name says (another SHA-256): it may be cut off; remove"
                " it, and it is downloaded again"
            )
        network = models.get_model(arch, weights=weights)
    with atomic_file(path) as file:
        torch.save(network.state_dict(), file)


def _is_named_by_its_hash(path: Path) -> bool:
    """Whether the hash in the name of a file, as torch reads it, is that of its content; also if
    there is none."""
    found = re.search(r"-([0-9a-f]{8,})\.", path.name)
    with path.open("rb") as file:
        return not found or hashlib.file_digest(file, "sha256").hexdigest().startswith(found[1])
