"""From files of human preferences to tables a learner reads; nothing is dropped without being counted and named by its line."""
