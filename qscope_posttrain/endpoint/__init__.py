"""Chat-model clients (OpenAI-compatible or in-process) with retries and an on-disk answer cache."""
