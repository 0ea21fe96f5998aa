"""The auxiliary losses in other training frameworks: one thin module each, imported by nothing else in the package."""
