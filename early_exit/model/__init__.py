"""The multi-exit network, its heads and losses, and what it costs."""
