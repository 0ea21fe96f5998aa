"""What data are, by their features: benchmarks and a classifier."""
