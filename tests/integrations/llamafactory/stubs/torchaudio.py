"""In place of torchaudio, which LLaMA-Factory imports for audio data; no release fits the CPU build of torch here."""
