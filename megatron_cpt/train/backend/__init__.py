"""Devices: substitutions for CPU, kernels, process groups."""
