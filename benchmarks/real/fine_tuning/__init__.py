"""What the study `sasft` is made of."""
