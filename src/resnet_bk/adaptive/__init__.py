"""Adaptive compute: one file a room, and the primitive they share."""
