"""Tiny worlds on which every claim is reproduced: one engine, two tasks (switching, repetition), and the demo."""
