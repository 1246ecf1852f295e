"""Hugging Face folders: tensors, config.json, companion files, hub."""
