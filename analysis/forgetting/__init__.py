"""Deleting samples by id from everything that runs leave: stores, score shards, tables, lists and figures."""
