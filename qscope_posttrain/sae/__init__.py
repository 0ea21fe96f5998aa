"""The canonical sparse autoencoder (SAE): activations, files, hub and catalogue, training and quality."""
