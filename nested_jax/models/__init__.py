"""Models: configurations, blocks and the language model."""
