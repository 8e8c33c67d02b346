"""The tokenizer and chat template of a checkpoint, read by transformers, and the files that a bundle takes along."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.errors import InputError

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)
"""What a loader may want beside the artifact, copied as it is where the checkpoint has it."""
CHAT_TEMPLATE = "chat_template.jinja"


class Tokenizer:
    """Text to token ids and back, as the model was trained with."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").exists():
            raise InputError(
                f"{folder} has no tokenizer.json",
                hint="copy tokenizer.json and tokenizer_config.json into the checkpoint",
            )
        self.folder = folder

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        try:
            return PreTrainedTokenizerFast.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
            raise InputError(
                f"{self.folder / 'tokenizer.json'} cannot be read: {error}", hint="copy the tokenizer's files again"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids with whatever the tokenizer puts in front (Llama: the begin token, once)."""
        ids: list[int] = self._tokenizer.encode(text, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def chat_template(self) -> str | None:
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else None

    def chat(self, message: str) -> list[int]:
        """Token ids of one user message in the model's chat template, ready for the assistant to answer."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids
