"""Tokens per second of one engine on one thread, beside the peers that run on CPU."""
