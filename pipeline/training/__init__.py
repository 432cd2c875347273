"""Learning from a table, on Ray Train: what runs any `TrainingJob`."""
