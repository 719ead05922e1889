"""Run a trained model: load it, generate text, decode speculatively or by CUDA graphs."""
