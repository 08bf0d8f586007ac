"""A run is never lost: checkpoints, what an earlier process left in a run directory, signals, full disks."""
