"""Early exits on small images: CIFAR-10, CIFAR-100, MNIST and digits."""
