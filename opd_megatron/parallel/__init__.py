"""Ranks, process groups and what travels between them."""
