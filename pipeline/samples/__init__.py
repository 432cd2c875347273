"""Where each sample of reinforcement learning is: issued, generated, scored, ended."""
