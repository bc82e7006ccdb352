"""Early exits on ImageNet and other images in class folders."""
