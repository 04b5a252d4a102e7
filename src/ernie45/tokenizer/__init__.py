"""Text to token ids and back, and chat templates."""

from ernie45.tokenizer.detokenizer import TextAssembler
from ernie45.tokenizer.reply_parser import RESPONSE, THINK, THINK_END, TextDelta, split_reply
from ernie45.tokenizer.templates import ERNIE45_TEMPLATE, ChatTemplate, load_template
from ernie45.tokenizer.vocabulary import Tokenizer, load_tokenizer

__all__ = [
    "ERNIE45_TEMPLATE",
    "RESPONSE",
    "THINK",
    "THINK_END",
    "ChatTemplate",
    "TextAssembler",
    "TextDelta",
    "Tokenizer",
    "load_template",
    "load_tokenizer",
    "split_reply",
]
