"""Run directories, job scripts, submission, plans; imports no torch."""
