"""The command line: `gptjax run | chat | generate | eval | convert | plan | tokenizer`."""
