"""From samples and texts to labeled tokens with their languages."""
