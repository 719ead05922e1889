"""Corpora, token files, batches."""
