"""Capacity planning: how many workers of each kind, and where."""
