"""What people see while a run is at work: metrics, live view, log."""
