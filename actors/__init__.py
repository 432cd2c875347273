"""The actors, which do the work: rollout, reward, reference and learner, and the tables they exchange."""
