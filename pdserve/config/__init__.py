"""Settings of every process: read from YAML, checked before anything starts."""
