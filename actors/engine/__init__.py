"""Generation: an engine turns requests into completions, in one process, without Ray."""
