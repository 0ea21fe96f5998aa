"""The arithmetic testbed: written sums modulo 10, and a model that very seldom repeats a step without end."""
