"""Steered-negative DAPO: one steered repetition rollout per group of a stock `trl.GRPOTrainer`."""
