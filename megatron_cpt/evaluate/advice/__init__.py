"""What to do next with a stage."""
