"""From a model and some text to a task: what `megatron-cpt init` proposes and writes."""
