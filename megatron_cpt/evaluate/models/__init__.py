"""Models measured: perplexity, forgetting, generation, weights."""
