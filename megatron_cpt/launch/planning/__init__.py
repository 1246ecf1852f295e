"""Requirements of a run: memory, disk, time, layouts that fit."""
