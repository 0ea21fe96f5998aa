"""Quality of a sparse autoencoder on real activations."""
