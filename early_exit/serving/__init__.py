"""A deployed model as a service: the engine that runs its segments, and HTTP around it."""
