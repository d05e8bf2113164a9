"""Models: specs, weights from files, and the one decoder that runs them."""
