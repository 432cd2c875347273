"""Reward workers, which score rollouts by a user's function or a reward model."""
