"""Find the features of a language, of repetition, or of a contrast between texts."""
