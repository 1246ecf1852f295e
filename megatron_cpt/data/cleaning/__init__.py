"""Documents to fewer documents: dedup, decontamination, sampling, rewriting."""
