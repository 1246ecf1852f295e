"""The blend of a stage: sources, budget, order of samples, replay, epochs."""
