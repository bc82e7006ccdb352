"""Data sets: the protocol, splits, images in memory and images in class folders."""
