"""What runs on the nodes of a job: supervisor, launcher, ranks, preflight."""
