"""The client of the public service, and load generators on top of it."""
