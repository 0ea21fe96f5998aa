"""The canonical sparse autoencoder (SAE): activations, files, hub and catalog, training and quality."""
