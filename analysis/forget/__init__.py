"""Deletes samples from everything that runs leave, and verifies that they are gone."""
