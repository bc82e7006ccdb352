"""AlexNet for 32x32 images, with the widths of BranchyNet's public code (arXiv:1709.01686).

The places for exits are `conv1` .. `conv5`, directly after a convolution, and `pool1` and `pool2`,
after ReLU and pooling.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class AlexNet(nn.Module):
    """Five convolutions and three linear layers, the first two with dropout.

    It omits the original's local response normalisation, which at the strength used there (5e-5) is
    nearly a constant factor. Maps images (B, C, H, W) of 32x32 or 28x28 pixels to logits (B, K).

    shape: of an image, (C, H, W).
    """

    default_exits = ("conv2", "conv3")

    def __init__(self, num_classes: int = 10, shape: Sequence[int] = (3, 32, 32)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.conv3 = nn.Conv2d(64, 96, 3, padding=1)
        self.conv4 = nn.Conv2d(96, 96, 3, padding=1)
        self.conv5 = nn.Conv2d(96, 64, 3, padding=1)
        self.pool = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 256),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.conv2(self.pool(self.conv1(images))))
        features = self.conv4(self.conv3(features).relu()).relu()
        return self.classifier(self.pool(self.conv5(features)))

    def units(self) -> dict[str, nn.Module]:
        """The blocks in order, by name. Applied one after the other they equal `forward`."""
        return {
            "conv1": self.conv1,
            "pool1": self.pool,
            "conv2": self.conv2,
            "pool2": self.pool,
            "conv3": self.conv3,
            "conv4": nn.Sequential(nn.ReLU(), self.conv4),
            "conv5": nn.Sequential(nn.ReLU(), self.conv5),
            "classifier": nn.Sequential(self.pool, self.classifier),
        }
