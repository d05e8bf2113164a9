"""Texts whose greedy answers must be the same on every path through the cluster."""

PROMPTS: tuple[str, ...] = (
    "The capital of France is",
    "Once upon a time, in a village by the river, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at one hundred degrees, and ice melts at",
    "The three primary colours are red,",
    "1, 2, 3, 4, 5, 6, 7,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "In 1969 two astronauts walked on",
    "Recipe for bread:\n- flour\n- water\n-",
    "SELECT name, price FROM products WHERE",
    "A mill needs water, and the water comes through",
    "To be, or not to be, that is",
    "The opposite of hot is cold, the opposite of big is",
    "Photosynthesis is the process by which plants",
    "<html>\n<head>\n<title>",
    "Monday, Tuesday, Wednesday,",
    "It was a dark and stormy night;",
    "The sum of two and three is five, and the sum of four and",
    "Music",
)
"""Twenty prompts, from one token to a few dozen; none is a chat."""
