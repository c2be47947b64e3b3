"""Models with parameters and tokenizer: `LanguageModel`, `EncoderModel`, `TextToText`, and those with heads."""
