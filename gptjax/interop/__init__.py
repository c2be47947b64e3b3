"""Import and export of other programs' models and tokenizers."""
