"""SASFT: sparse autoencoder features as an auxiliary loss of a stock `trl.SFTTrainer`."""
