"""Asking a chat model, behind an OpenAI-compatible endpoint or in this process, and losing no answer."""
