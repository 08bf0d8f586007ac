"""Projected gradients on disk: written once by any number of ranks, kept safe, searched exactly."""

from ghost.store.store import ProjectionStore
from ghost.store.writer import StoreWriter

__all__ = ["ProjectionStore", "StoreWriter"]
