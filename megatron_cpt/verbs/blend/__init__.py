"""The sub-verbs of `blend`."""
