"""The assembly of a step's experience: joined, shaped, estimated, whitened."""
