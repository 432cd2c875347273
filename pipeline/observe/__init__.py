"""What a run shows: progress, metrics, summaries."""
