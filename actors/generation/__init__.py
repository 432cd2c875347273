"""Turning prompts into completions on full weights."""
