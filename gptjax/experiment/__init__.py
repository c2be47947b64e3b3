"""Experiments: model, tokenizer and stages put together as data; finding them by name, running them, reporting."""
