"""Hugging Face folders, Megatron checkpoints, conversion between them, and soups."""
