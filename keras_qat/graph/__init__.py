"""Model → model, one step per file: trace (with lower), twins, lookups, fuse, annotate; then freeze to integers."""
