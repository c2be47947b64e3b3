"""GGUF, the file format of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

`architectures/` maps the models of llama.cpp to families of Hugging Face, in both directions.
"""
