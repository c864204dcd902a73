"""Normalizations that look at each sample."""

RULES = {}
