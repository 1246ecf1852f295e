"""A task from a model and some text, as proposed and written by `megatron-cpt init`."""
