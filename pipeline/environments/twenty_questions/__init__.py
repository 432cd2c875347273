"""Twenty questions: a game with a known best play, as an environment and as a task."""
