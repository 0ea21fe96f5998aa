"""The second task: train a small model that seldom repeats itself without end, with and without negatives in DAPO."""
