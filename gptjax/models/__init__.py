"""Models with parameters and tokenizer: `LanguageModel`, `EncoderModel`, `TextToText`, `ClassifierModel`."""
