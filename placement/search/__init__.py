"""The parts of `placement.solver`: candidates, bounds, evaluation, searches, what-ifs."""
