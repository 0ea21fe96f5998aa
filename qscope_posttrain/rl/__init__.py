"""DAPO with negatives: `trl.GRPOTrainer` with a repetition, seeded or steered, in each group."""
