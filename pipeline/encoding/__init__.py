"""From text to the token tables that learners and rollouts read."""
