"""The SDK: talk to a router from Python."""
