"""Recommendation of the next step for a stage."""
