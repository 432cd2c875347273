"""The learner, which trains a model under DeepSpeed: one rank of it, and all the parts of a rank."""
