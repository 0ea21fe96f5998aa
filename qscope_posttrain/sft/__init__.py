"""Auxiliary losses for supervised fine-tuning on a stock `trl.SFTTrainer`: SASFT, token penalty, KL anchor."""
