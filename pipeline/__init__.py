"""What to train, in which order: driver, ledger, buffer, algorithms, tasks, command line."""
