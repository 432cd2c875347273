"""What people read when a run is done: tables, sentences, pictures."""
