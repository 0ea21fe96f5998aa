"""Commands. Each module parses arguments, calls the package, and prints; `main` chooses the module by name."""
