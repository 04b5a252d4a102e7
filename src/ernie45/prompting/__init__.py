"""Messages (with their pictures and clips) to a Prompt."""

from ernie45.prompting.media import VisionInput
from ernie45.prompting.messages import ROLES
from ernie45.prompting.preview import preview_media
from ernie45.prompting.prompter import Prompter, no_tokenizer

__all__ = ["ROLES", "Prompter", "VisionInput", "no_tokenizer", "preview_media"]
