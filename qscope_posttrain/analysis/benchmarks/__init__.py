"""Benchmark analysis by SAE features: redundancy and overlap (Qwen-Scope, arXiv 2605.11887, section 4)."""
