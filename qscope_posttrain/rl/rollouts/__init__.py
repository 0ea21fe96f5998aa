"""Generation of a batch with negatives among its rows."""
