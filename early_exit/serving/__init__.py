"""Serving a deployed model: rows of different requests share the runs of the segments."""
