"""The front door: HTTP and gRPC in, workers chosen, tokens out."""
