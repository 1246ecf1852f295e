"""`python -m megatron_cpt` is `megatron-cpt`."""

from megatron_cpt.cli import main

if __name__ == "__main__":
    main()
