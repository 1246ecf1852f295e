"""Continual pre-training on Megatron-Core: from raw text and a base model to a better model."""

__version__ = "0.1.0"
