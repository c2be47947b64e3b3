"""Data: where text comes from (sources), how it becomes tokens (tokenizers) and batches
(a file for each kind of data: pretrain, chat, classify, pairs).

from gptjax import data

data.Pretrain(data.TFDS("c4/en"), length=1_024, batch=512)
data.Pretrain(data.Mix((data.PyDocs(), data.Text("books/*.txt")), weights=(3, 1)))
data.Chat(data.ChatJsonl("conversations.jsonl"), length=512, batch=32)
data.Classify(data.LabelledJsonl("reviews.jsonl", classes=("good", "bad")), length=256, batch=32)
"""

from gptjax.data.batches import Batches, ValidationBatches
from gptjax.data.chat import Chat, Conversation, Message
from gptjax.data.classify import Classify
from gptjax.data.dataset import Dataset
from gptjax.data.mix import Mix
from gptjax.data.packing import BestFit, Concatenate
from gptjax.data.pairs import Pairs
from gptjax.data.pretrain import Pretrain
from gptjax.data.pydocs import PyDocs, PyDocsChat
from gptjax.data.sources import TFDS, ChatJsonl, Example, Jsonl, LabelledJsonl, PairsJsonl, Text, TextPair
from gptjax.data.store import Tokens
from gptjax.data.tokenizers import (
    CHAT_SPECIALS,
    Bytes,
    LoadTokenizer,
    Tokenizer,
    TrainCharacters,
    TrainSentencePiece,
    load_tokenizer,
)

__all__ = [
    "CHAT_SPECIALS",
    "TFDS",
    "Batches",
    "BestFit",
    "Bytes",
    "Chat",
    "ChatJsonl",
    "Classify",
    "Concatenate",
    "Conversation",
    "Dataset",
    "Example",
    "Jsonl",
    "LabelledJsonl",
    "LoadTokenizer",
    "Message",
    "Mix",
    "Pairs",
    "PairsJsonl",
    "Pretrain",
    "PyDocs",
    "PyDocsChat",
    "Text",
    "TextPair",
    "Tokenizer",
    "Tokens",
    "TrainCharacters",
    "TrainSentencePiece",
    "ValidationBatches",
    "load_tokenizer",
]
