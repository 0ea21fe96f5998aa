"""Synthesis of safety data that reaches chosen features (Qwen-Scope report, section 6)."""
