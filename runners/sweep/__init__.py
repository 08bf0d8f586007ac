"""Sweeps: several jobs from one command line, frozen when it is typed, shown under one parent run."""
