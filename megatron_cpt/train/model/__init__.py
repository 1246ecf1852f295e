"""The model of a run: layer specs, attention, loss."""
