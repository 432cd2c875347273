"""Is the policy better, and at what price: replies, judges and statistics."""
