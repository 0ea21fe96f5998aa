"""Files that hold tensors, whatever they mean, and the JSON settings beside them."""
