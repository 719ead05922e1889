"""Training, evaluation and generation on transformers' engine."""
