"""The run directory and its records: names, ledger, lock, progress, variants, revision."""
