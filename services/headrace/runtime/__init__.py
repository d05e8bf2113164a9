"""The only place that knows asyncio, gRPC servers and process lifecycles in general."""
