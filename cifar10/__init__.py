"""Early exits on CIFAR-10: networks, data, trainer and evaluation."""
