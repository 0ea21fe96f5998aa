"""Safety data made to reach chosen features (Qwen-Scope report, section 6)."""
