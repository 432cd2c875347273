"""Training on given data before reinforcement learning: fine-tuning and the reward model."""
