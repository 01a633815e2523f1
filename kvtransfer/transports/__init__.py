"""Ways to read another worker's KV memory; `open_transports` picks those that this host has."""
