"""A chat service: OpenAI's HTTP interface over the engine, and a page to chat in. `gptjax serve PATH`."""
