"""How the negatives of a generation batch come about while the batch is generated."""
