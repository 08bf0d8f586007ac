"""Which samples are kept and which are dropped, by their values."""
