"""Starting a cluster from a file: local processes first."""
