"""The block and its parts: token mixers, feed-forwards, normalization; the loss of the head."""
