"""The page `report.html`: everything a run directory knows, in one file without a network."""
