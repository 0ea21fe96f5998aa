"""The tiny world on which every claim is reproduced: corpus, tokenizer, language model, SAEs, SASFT arms, demo."""
