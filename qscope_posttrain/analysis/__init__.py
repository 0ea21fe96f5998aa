"""Analysis of data by the features that they fire: benchmarks and a text classifier."""
