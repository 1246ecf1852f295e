"""What `import megatron_cpt as cpt` offers: twelve functions that take paths and keywords and return dataclasses."""
