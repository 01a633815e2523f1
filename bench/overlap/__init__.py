"""How much of the KV's way is seen when it travels beside the computation."""
