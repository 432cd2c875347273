"""The models that a learner can train: policy, critic and reward model; each file implements `base.Trainee`."""
