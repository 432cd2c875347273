"""Rollout workers, and the conversations that they have."""
