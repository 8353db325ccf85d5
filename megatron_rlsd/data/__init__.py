"""Problem sources, tokenizers, and the prompts of student and teacher."""

from megatron_rlsd.data.chat_turns import ChatTurns, TurnText
from megatron_rlsd.data.conversations import Conversations
from megatron_rlsd.data.evaluation_sets import evaluation_sets
from megatron_rlsd.data.prompts import Privileged, PromptBuilder, PromptTooLong
from megatron_rlsd.data.sentencepiece_tokenizer import (
    DEFAULT_CHAT_TEMPLATE,
    SentencePieceTokenizer,
    train_sentencepiece,
)
from megatron_rlsd.data.sources import (
    MixedSource,
    ProblemSource,
    ProblemTable,
    build_sources,
    evaluation_problems,
    open_table,
    refuse_demonstration,
)
from megatron_rlsd.data.tokenizers import (
    Tokenizer,
    load_tokenizer,
    plain_encoder,
    warn_of_other_ids,
)

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "ChatTurns",
    "Conversations",
    "MixedSource",
    "Privileged",
    "ProblemSource",
    "ProblemTable",
    "PromptBuilder",
    "PromptTooLong",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TurnText",
    "build_sources",
    "evaluation_problems",
    "evaluation_sets",
    "load_tokenizer",
    "open_table",
    "plain_encoder",
    "refuse_demonstration",
    "train_sentencepiece",
    "warn_of_other_ids",
]
