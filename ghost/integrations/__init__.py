"""Scoring inside other libraries' training loops: one module each, imported by its users alone."""
