"""Data: sources of text, tokenizers, and batches (one file per kind of data: pretrain, chat, classify, pairs).

from gptjax import data

data.Pretrain(data.TFDS("c4/en"), length=1_024, batch=512)
data.Pretrain(data.Mix((data.PyDocs(), data.Text("books/*.txt")), weights=(3, 1)))
data.Chat(data.ChatJsonl("conversations.jsonl"), length=512, batch=32)
data.Chat(data.Conversations(data.HFDataset("HuggingFaceH4/ultrachat_200k", train="train_sft")), length=512, batch=32)
data.Classify(data.LabelledJsonl("reviews.jsonl", classes=("good", "bad")), length=256, batch=32)
data.Preferences(data.PreferencesJsonl("chosen.jsonl"), length=1_024, batch=16)
data.UnpairedPreferences(data.UnpairedPreferencesJsonl("thumbs.jsonl"), length=1_024, batch=16)

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.data.canaries import WithCanaries
    from gptjax.data.chat import Chat, Conversation, Message
    from gptjax.data.classify import Classify, Regress
    from gptjax.data.conversations import Alpaca, ChatJsonl, Conversations, OpenAIMessages, ShareGPT
    from gptjax.data.dataset import Batches, Dataset, Pretrain, ValidationBatches
    from gptjax.data.folds import Fold
    from gptjax.data.hf_dataset import HFDataset
    from gptjax.data.mix import Mix, Reweight
    from gptjax.data.packing import BestFit, Concatenate, NoPacking
    from gptjax.data.pairs import Pairs, PairsJsonl, TextPair
    from gptjax.data.plain_text import PlainText
    from gptjax.data.preferences import Preference, Preferences, PreferencesJsonl
    from gptjax.data.pydocs import PyDocs, PyDocsChat
    from gptjax.data.questions import ExtractAnswers, Question, QuestionsJsonl
    from gptjax.data.show import Piece, pieces
    from gptjax.data.similar import Similar
    from gptjax.data.sources import TFDS, Example, LabelledJsonl, NumbersJsonl, Text
    from gptjax.data.store import Tokens
    from gptjax.data.tables import Csv, Jsonl, Parquet
    from gptjax.data.tags import ClassifySteps, ClassifyTokens, Steps, StepsJsonl, Tagged, TaggedJsonl
    from gptjax.data.tokenizers import (
        CHAT_SPECIALS,
        Bytes,
        LoadTokenizer,
        Tokenizer,
        TrainCharacters,
        TrainSentencePiece,
        load_tokenizer,
    )
    from gptjax.data.unpaired_preferences import LabelledReply, UnpairedPreferences, UnpairedPreferencesJsonl

__all__ = [
    "CHAT_SPECIALS",
    "TFDS",
    "Alpaca",
    "Batches",
    "BestFit",
    "Bytes",
    "Chat",
    "ChatJsonl",
    "Classify",
    "ClassifySteps",
    "ClassifyTokens",
    "Concatenate",
    "Conversation",
    "Conversations",
    "Csv",
    "Dataset",
    "Example",
    "ExtractAnswers",
    "Fold",
    "HFDataset",
    "Jsonl",
    "LabelledJsonl",
    "LabelledReply",
    "LoadTokenizer",
    "Message",
    "Mix",
    "NoPacking",
    "NumbersJsonl",
    "OpenAIMessages",
    "Pairs",
    "PairsJsonl",
    "Parquet",
    "Piece",
    "PlainText",
    "Preference",
    "Preferences",
    "PreferencesJsonl",
    "Pretrain",
    "PyDocs",
    "PyDocsChat",
    "Question",
    "QuestionsJsonl",
    "Regress",
    "Reweight",
    "ShareGPT",
    "Similar",
    "Steps",
    "StepsJsonl",
    "Tagged",
    "TaggedJsonl",
    "Text",
    "TextPair",
    "Tokenizer",
    "Tokens",
    "TrainCharacters",
    "TrainSentencePiece",
    "UnpairedPreferences",
    "UnpairedPreferencesJsonl",
    "ValidationBatches",
    "WithCanaries",
    "load_tokenizer",
    "pieces",
]

_NAMES = {
    "gptjax.data.canaries": "WithCanaries",
    "gptjax.data.chat": "Chat Conversation Message",
    "gptjax.data.classify": "Classify Regress",
    "gptjax.data.conversations": "Alpaca ChatJsonl Conversations OpenAIMessages ShareGPT",
    "gptjax.data.dataset": "Batches Dataset Pretrain ValidationBatches",
    "gptjax.data.folds": "Fold",
    "gptjax.data.hf_dataset": "HFDataset",
    "gptjax.data.mix": "Mix Reweight",
    "gptjax.data.packing": "BestFit Concatenate NoPacking",
    "gptjax.data.pairs": "Pairs PairsJsonl TextPair",
    "gptjax.data.plain_text": "PlainText",
    "gptjax.data.preferences": "Preference Preferences PreferencesJsonl",
    "gptjax.data.pydocs": "PyDocs PyDocsChat",
    "gptjax.data.questions": "ExtractAnswers Question QuestionsJsonl",
    "gptjax.data.show": "Piece pieces",
    "gptjax.data.similar": "Similar",
    "gptjax.data.sources": "TFDS Example LabelledJsonl NumbersJsonl Text",
    "gptjax.data.store": "Tokens",
    "gptjax.data.tables": "Csv Jsonl Parquet",
    "gptjax.data.tags": "ClassifySteps ClassifyTokens Steps StepsJsonl Tagged TaggedJsonl",
    "gptjax.data.tokenizers": (
        "CHAT_SPECIALS Bytes LoadTokenizer Tokenizer TrainCharacters TrainSentencePiece load_tokenizer"
    ),
    "gptjax.data.unpaired_preferences": "LabelledReply UnpairedPreferences UnpairedPreferencesJsonl",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax.data' has no attribute {name!r}")
