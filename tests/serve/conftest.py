"""A server of the tiny model, and OpenAI's client of it, for a file of tests that needs no other."""

import openai
import pytest


@pytest.fixture(scope="module")
def server():
    from test_serve import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
