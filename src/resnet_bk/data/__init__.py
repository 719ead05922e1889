"""Text: corpora, byte ids, token files."""
