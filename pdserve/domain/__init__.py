"""Values and rules that every process shares; no I/O, no torch, no grpc."""
