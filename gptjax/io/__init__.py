"""Files and networks: atomic writes, retries."""
