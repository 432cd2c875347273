"""Submission: a run as a job of a cluster."""
