"""The stages of alignment, each turning artifacts into artifacts."""
