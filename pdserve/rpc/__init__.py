"""gRPC adapters: codec, channels, message streams, error replies."""
