"""The parts of a block: token mixers, feed-forwards, normalisation."""
