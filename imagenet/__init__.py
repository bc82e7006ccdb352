"""Early exits on ImageNet."""
