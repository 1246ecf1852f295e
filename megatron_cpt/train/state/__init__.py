"""State that a run loads and saves: weights, optimizer state, checks of a resume."""
