"""What is in a string or a vocabulary: Unicode scripts and the languages they give away."""
