"""Measured kernel times and how to read between the points."""
