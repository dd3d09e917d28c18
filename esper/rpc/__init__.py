"""The thin gRPC layer: servers and clients of the library and of the event bus."""
