"""Adaptive compute: one file for each technique, and what they share."""
