"""The command line as data: command, recipe and overrides; and the texts of `--help`."""
