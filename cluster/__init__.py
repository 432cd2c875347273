"""Where the work runs: session, placement, pools, gangs. Knows nothing of reinforcement learning."""
