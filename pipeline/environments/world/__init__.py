"""A small simulated dialogue world with a known best play: a partner with a mood and a topic, and an exact grammar."""
