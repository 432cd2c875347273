"""The manager: the high-level policy, which chooses an option for each turn of a conversation."""
