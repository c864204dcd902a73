"""Attention."""

RULES = {}
