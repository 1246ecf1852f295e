"""Submission of training, pipelines, sweeps and single verbs."""
