"""Recurrent layers, unrolled over their fixed number of steps."""

RULES = {}
