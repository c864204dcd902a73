"""Moving, cutting and joining."""

RULES = {}
