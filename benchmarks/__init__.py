"""Side-by-side measurements: each figure is a ratio of times taken in one run, interleaved."""
