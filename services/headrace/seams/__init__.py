"""Extension points: one Protocol a file, each filled by a technique that exists."""
