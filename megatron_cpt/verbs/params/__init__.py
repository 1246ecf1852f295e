"""The sub-verbs of `params`."""
