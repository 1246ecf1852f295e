"""What is handed to a scheduler: training, pipelines, sweeps, single verbs."""
