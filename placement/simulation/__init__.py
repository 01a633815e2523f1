"""Discrete-event kernels of the planner's simulator; `placement.simulate` is their front."""
