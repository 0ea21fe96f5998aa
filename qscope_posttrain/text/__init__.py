"""Strings and vocabularies: files of text, scripts, languages, tokens of a language, repetition."""
