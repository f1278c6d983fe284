"""Edit a language model's weights, measure what the edit did, and ship the result."""

__version__ = "0.1.0"
