"""What becomes of a guarantee on images that it does not cover: noise, blur, another brightness.

    python cifar10/eval.py runs/resnet20-mixed --risk 1 --no-live --name risk1
    python docs-src/figures/corruptions.py runs/resnet20-mixed risk1

Runs the evaluation's policy, exits taken, on test images of CIFAR-10 that were changed, and the
whole network on the same ones. Prints a table; noise is seeded.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cifar10.trainer import DOOR
from early_exit import flags
from early_exit.trained import load_run
from early_exit.inference import infer
from early_exit.policy import NEVER, Policy

BATCH = 500


def noise(strength: float) -> Callable[[Tensor], Tensor]:
    """Gaussian noise of that deviation, in grey levels."""
    return lambda images: images + strength * torch.randn(images.shape)


def blur(sigma: float) -> Callable[[Tensor], Tensor]:
    """A Gaussian of that deviation, in pixels."""
    return lambda images: F.gaussian_blur(images, kernel_size=9, sigma=sigma)


def brightness(factor: float) -> Callable[[Tensor], Tensor]:
    """Grey levels times a factor."""
    return lambda images: images * factor


CHANGES = {
    "as they are": lambda images: images,
    "noise, 4 grey levels": noise(4),
    "noise, 8": noise(8),
    "noise, 16": noise(16),
    "blur, 0.5 pixels": blur(0.5),
    "blur, 0.75": blur(0.75),
    "blur, 1": blur(1),
    "brightness, 0.5": brightness(0.5),
    "brightness, 1.5": brightness(1.5),
}


def parser() -> flags.Parser:
    """The flags."""
    parser = flags.build_parser(
        "corruptions.py", "python docs-src/figures/corruptions.py RUN EVALUATION [flags]", __doc__
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("evaluation", metavar="EVALUATION", help="name of an evaluation of it")
    return parser


@torch.inference_mode()
def main() -> None:
    """Measures and prints."""
    args = parser().parse_args()
    trained = load_run(args.run, DOOR, {})
    network, test = trained.network, trained.data.splits["test"]
    policy = Policy.load(args.run / "eval" / args.evaluation / "policy.yaml")
    never = policy.shared(NEVER)
    early = [f"at {name}" for name in policy.exit_names[:-1]]
    print(f"| test images | {' | '.join(early)} | MACs | whole network | exits taken | lost |")
    print("| --- |" + " ---: |" * (len(early) + 4))
    shares = torch.tensor(trained.cost.shares(policy.enabled))
    for name, change in CHANGES.items():
        torch.manual_seed(0)
        taken, right, full = [], [], []
        for start in range(0, len(test.targets), BATCH):
            rows = slice(start, start + BATCH)
            images = change(test.images[rows].float()).round().clamp(0, 255).byte()
            images, targets = trained.data.normalise(images), test.targets[rows]
            answers = infer(network, images, policy, trained.autocast)
            taken.append(answers.exit_index)
            right.append(answers.classes == targets)
            full.append(infer(network, images, never, trained.autocast).classes == targets)
        taken, right, full = map(torch.cat, (taken, right, full))
        leave = [
            f"{100 * float((taken == index).float().mean()):.1f} %" for index in range(len(early))
        ]
        cells = [*leave, f"{100 * float(shares[taken].mean()):.1f} %"]
        cells += [
            f"{100 * float(part.float().mean()):.2f} %" for part in (full, right, full & ~right)
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
