"""The router: takes requests, picks workers, relays tokens."""
