"""Reinforcement learning: the driver's loop, phase by phase, and what it keeps account of."""
