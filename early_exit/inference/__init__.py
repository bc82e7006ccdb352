"""Deciding which rows exit, inference with exits taken, and its latency."""
