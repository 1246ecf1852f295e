"""Documents to token shards: plan of shards, worker processes, writer."""
