"""Single programs around training: LR finder, fork, trace, logits, self-test, preflight."""
