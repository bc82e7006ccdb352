"""The usual training loop, with which the benchmarks of training compare ours.

PIL transforms in a DataLoader, float32, contiguous, SGD, batch 128, as in akamaster's script for
the CIFAR ResNets; the DataLoader has 2 workers, for machines of two cores.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cifar10 import networks
from cifar10.data import MEAN, STD
from early_exit.data.in_memory import ImageSet
from early_exit.system.device import choose_device

BATCH = 128
IMAGES = 50 * BATCH


class PilImages(Dataset):
    """Images as torchvision's CIFAR10 returns them: one PIL image at a time, transformed."""

    def __init__(self, images: ImageSet) -> None:
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = images.targets.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, padding=4),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]


def random_images(count: int = IMAGES) -> ImageSet:
    """The images that all loops train on."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    targets = rng.integers(0, 10, count)
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(targets))


def usual_loop(args: argparse.Namespace, arch: str, images: int = IMAGES) -> Iterator[None]:
    """One training step of the plain network `arch` per `next`, on so many random images."""
    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in akamaster's script
    network = networks.build_backbone(arch).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(
        PilImages(random_images(images)),
        BATCH,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    while True:
        for batch, target in loader:
            batch, target = batch.to(device), target.to(device)
            loss = F.cross_entropy(network(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield
