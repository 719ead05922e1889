"""Adaptive compute: the techniques, how they nest, and what they share."""
