"""What a run leaves on the disk, and whether the next start may go on with it."""
