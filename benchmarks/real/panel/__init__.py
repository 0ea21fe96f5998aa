"""A panel of models scored on real benchmarks, the features of the same items, and how the two go together."""
