"""Everything that runs a trained model: loading, generation, speculation, steps as CUDA graphs."""
