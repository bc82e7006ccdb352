"""Shows that a guarantee does not hold on other images: noise, blur, changed brightness.

    python cifar10/eval.py runs/resnet20-mixed --risk 1 --no-live --name risk1
    python docs-src/figures/corruptions.py runs/resnet20-mixed risk1

Runs the policy of an evaluation, exits taken, on changed test images of CIFAR-10, and the whole
network on the same images. Noise is seeded. Prints a table.
"""

if __name__ == "__main__":  # before the imports, which take seconds and may fail
    import os
    import sys

    sys.path.insert(
        0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    )
    from early_exit.cli.border import run

    run("corruptions", "corruptions.py")

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cifar10.trainer import TASK
from early_exit.cli import flags
from early_exit.inference.infer import infer
from early_exit.inference.policy import NEVER, Policy
from early_exit.trained import Trained, load_run

BATCH = 500


def noise(strength: float) -> Callable[[Tensor], Tensor]:
    """Adds Gaussian noise with this standard deviation, in grey levels."""
    return lambda images: images + strength * torch.randn(images.shape)


def blur(sigma: float) -> Callable[[Tensor], Tensor]:
    """Convolves with a Gaussian of this standard deviation, in pixels."""
    return lambda images: F.gaussian_blur(images, kernel_size=9, sigma=sigma)


def brightness(factor: float) -> Callable[[Tensor], Tensor]:
    """Multiplies the grey levels by a factor."""
    return lambda images: images * factor


CORRUPTIONS = {
    "unchanged": lambda images: images,
    "noise, 4 grey levels": noise(4),
    "noise, 8": noise(8),
    "noise, 16": noise(16),
    "blur, 0.5 pixels": blur(0.5),
    "blur, 0.75": blur(0.75),
    "blur, 1": blur(1),
    "brightness, 0.5": brightness(0.5),
    "brightness, 1.5": brightness(1.5),
}


@dataclass(frozen=True)
class Result:
    """What the test images do under one corruption; all fields: (images,)."""

    exit_index: Tensor
    correct: Tensor
    """Whether the answer with exits taken is correct."""
    whole_correct: Tensor
    """Whether the answer of the whole network is correct."""


@torch.inference_mode()
def run_corrupted(trained: Trained, policy: Policy, corrupt: Callable[[Tensor], Tensor]) -> Result:
    """Runs all test images, corrupted, with exits taken and through the whole network."""
    torch.manual_seed(0)
    test, never = trained.data.splits["test"], policy.with_threshold(NEVER)
    exit_index, correct, whole_correct = [], [], []
    for start in range(0, len(test.targets), BATCH):
        rows = slice(start, start + BATCH)
        images = corrupt(test.images[rows].float()).round().clamp(0, 255).byte()
        images, targets = trained.data.normalise(images), test.targets[rows]
        answers = infer(trained.network, images, policy, trained.autocast)
        whole = infer(trained.network, images, never, trained.autocast)
        exit_index.append(answers.exit_index)
        correct.append(answers.classes == targets)
        whole_correct.append(whole.classes == targets)
    return Result(torch.cat(exit_index), torch.cat(correct), torch.cat(whole_correct))


def parser() -> flags.Parser:
    """The script's flags."""
    parser = flags.build_parser(
        "corruptions.py", "python docs-src/figures/corruptions.py RUN EVALUATION", __doc__
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("evaluation", metavar="EVALUATION", help="name of an evaluation of the run")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the network on each corruption and prints the table."""
    args = parser().parse_args(argv)
    trained = load_run(args.run, TASK, {"run": {"device": "cpu"}})
    policy = Policy.load(args.run / "eval" / args.evaluation / "policy.yaml")
    shares = torch.tensor(trained.cost.shares(policy.enabled))
    exits = [f"exit at {name}" for name in policy.exit_names[:-1]]
    print(
        f"| test images | {' | '.join(exits)} | MACs | accuracy of the whole network"
        " | accuracy with exits taken | images lost |"
    )
    print("| --- |" + " ---: |" * (len(exits) + 4))
    for name, corrupt in CORRUPTIONS.items():
        found = run_corrupted(trained, policy, corrupt)
        exited = [found.exit_index == index for index in range(len(exits))]
        lost = found.whole_correct & ~found.correct
        cells = [f"{percent(mask):.1f} %" for mask in exited]
        cells.append(f"{percent(shares[found.exit_index]):.1f} %")
        cells += [f"{percent(mask):.2f} %" for mask in (found.whole_correct, found.correct, lost)]
        print(f"| {name} | {' | '.join(cells)} |")


def percent(values: Tensor) -> float:
    """The mean of fractions or of a mask, in percent."""
    return 100 * float(values.float().mean())
