"""Model → model, one step per file, in this order: trace, lower, fuse, annotate; then freeze to integers."""
