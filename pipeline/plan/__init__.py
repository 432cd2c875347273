"""What is known of a run before it begins: checks, places, estimates."""
