"""The Python interface, `import megatron_cpt as cpt`: twelve functions that take paths and keywords and return
dataclasses."""
