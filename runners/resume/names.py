"""Files of a run directory that say how far its run has come."""

CONFIG_FILE = "config.yaml"  # what makes a directory a run's
FINISHED_FILE = "finished.json"
LOCK_FILE = ".run.lock"
