"""The OpenAI-compatible HTTP front: translates requests and answers, decides nothing."""
