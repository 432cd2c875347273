"""What a user may set: the sections, the rules between them, and recipes in TOML."""
