"""Reads finished runs: values, plots."""
