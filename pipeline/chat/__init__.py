"""A chat with a run's models, baseline and policy side by side; see README.md."""
