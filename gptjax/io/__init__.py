"""Files and networks: atomic writes, retries, servers with OpenAI's interface."""

API_KEY = "GPTJAX_API_KEY"
"""Environment variable with the API key of a server."""
