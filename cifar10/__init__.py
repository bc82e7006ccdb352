"""Early exits on small images: CIFAR-10, MNIST and digits."""
