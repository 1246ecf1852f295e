"""What a run will need: memory, disk, time, layouts that fit."""
