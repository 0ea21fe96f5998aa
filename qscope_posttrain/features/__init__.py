"""From activations to named features: one streaming pass, selectors, and the FeatureSet file."""
