"""The planner's simulator beside a plain Python event loop: `python -m bench.simulator`."""
