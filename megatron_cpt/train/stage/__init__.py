"""A stage from start to end: set-up, step, schedule, loop."""
