"""Continuous batching: many texts at a time, in pages that they share."""

from gptjax.inference.engine.engine import Engine as Engine
from gptjax.inference.engine.request import Busy as Busy
from gptjax.inference.engine.request import Generation as Generation
from gptjax.inference.engine.request import Request as Request
from gptjax.inference.engine.request import Token as Token
from gptjax.inference.engine.speculation import DraftModel as DraftModel
from gptjax.inference.engine.speculation import Heads as Heads
from gptjax.inference.engine.speculation import NGram as NGram
