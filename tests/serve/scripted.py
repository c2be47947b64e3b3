"""A service whose model writes given texts: to see what becomes of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import uvicorn
from starlette.applications import Starlette
from test_serve import model, port_of, until

from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import Generation, Request, Token
from gptjax.models.language_model import LanguageModel
from gptjax.serve.access import Policy
from gptjax.serve.app import make_app
from gptjax.serve.keys import Keys
from gptjax.serve.service import Served


class ScriptedEngine:
    """Writes `script(prompt)`, token by token, `pause` seconds apart; None among the pieces waits for `go`."""

    def __init__(self, tokenizer: Tokenizer, script: Callable[[str], str], context: int = 4096):
        self.tokenizer, self.script, self.context = tokenizer, script, context
        self.pause = 0.0
        self.prompts: list[str] = []
        self.requests: list[Request] = []
        self.go = threading.Event()
        self.go.set()
        self.active = self.waiting = 0
        self.rows, self.queue_limit = 100, 100
        self.broken, self.last_round = None, time.monotonic()

    def submit(self, request: Request) -> Generation:
        request.check(self.tokenizer.vocab, self.tokenizer.vocab, self.context)
        generation = Generation(request, self.tokenizer, None)
        self.prompts.append(self.tokenizer.decode(request.prompt))
        self.requests.append(request)
        threading.Thread(target=self._write, args=(generation, self.script(self.prompts[-1])), daemon=True).start()
        return generation

    def _write(self, generation: Generation, text: str) -> None:
        for i, token in enumerate(self.tokenizer.encode(text)[: generation.request.max_tokens]):
            self.go.wait(30)
            if generation.finish is not None:
                return
            p = -0.05 if i % 3 else -1.2
            generation.extend([Token(token, p, ((token, p), (100 + i % 100, -2.5)))])
            time.sleep(self.pause)
        generation.end("stop")

    def cancel(self, generation: Generation) -> None:
        generation.end("cancelled")

    def start(self) -> None:
        """Nothing to do: each text has a thread."""

    def close(self) -> None:
        self.go.set()


class ScriptedServer:
    """The application with a `ScriptedEngine`, on a free port or a given one, in a thread."""

    def __init__(
        self,
        script: Callable[[str], str],
        keys: Sequence[str] = (),
        lm: LanguageModel | None = None,
        names: Sequence[str] = ("tiny", "other"),
        context: int = 4096,
    ):
        lm = lm or LanguageModel(model().config, model().params, model().tokenizer, context=context)
        self.engine = ScriptedEngine(lm.tokenizer, script, context)
        self.models = {name: Served(lm, self.engine) for name in names}  # type: ignore
        self.port, self.policy = 0, Policy(Keys(others=keys))
        self.start()

    def start(self) -> None:
        self.app: Starlette = make_app(self.models, self.policy)
        config = uvicorn.Config(self.app, port=self.port, log_level="error", ws="none", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)
        self.port = port_of(self.server)  # kept when it is started again
        self.url = f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Close all connections, as a bad network does."""
        for connection in list(self.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)  # type: ignore

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
