"""What a dictionary is: the canonical sparse autoencoder, its activations, its files and a small trainer."""
