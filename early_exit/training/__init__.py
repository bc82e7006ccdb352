"""Training all exits, resumable at any step."""
