"""The package that the TinyBERT scripts share; importing it has no side effects."""
