"""Measurement of a model's learning and forgetting."""
