"""Where the work runs: session, placement, pools, gangs. This floor knows nothing of learning."""
