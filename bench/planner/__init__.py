"""Benchmarks of the planner: speed, optimality, Splitwise's question."""
