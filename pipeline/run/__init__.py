"""A run from recipe to report: its start, its stages, its end, and the commands that look at one."""
