"""Reports: curves of a run, charts, pages, sweeps."""
