"""Models and tokenizers of other programs, in and out."""
