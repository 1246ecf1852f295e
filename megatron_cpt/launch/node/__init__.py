"""Programs on the nodes of a job: supervisor, launcher, ranks, preflight."""
