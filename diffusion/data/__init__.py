"""Images from disk to batches: sources, decoding, and the order as a function of seed and step."""
