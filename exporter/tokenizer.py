"""The tokenizer and chat template of a checkpoint, read by transformers, and the files that a bundle takes along."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.checkpoint import gguf_file, meta
from exporter.checkpoint.gguf_tokenizer import cached_tokenizer
from exporter.checkpoint.meta_tokenizer import TOKENIZER, write_tokenizer
from exporter.errors import InputError
from exporter.files import sha256

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
)
"""What a loader may want beside the artifact, copied as it is where the checkpoint has it."""
CHAT_TEMPLATE = "chat_template.jinja"
_IMAGE = "<|image|>"
"""What stands for an image in a text of Llama 3.2 Vision: the first token behind the vocabulary. Meta's tokenizer has
it within, and its programs put the id right (meta-llama/llama-models, models/llama3/chat_format.py)."""
_CONVERSION = 1
"""Counts the changes of what ``write_tokenizer`` writes, so that what an older one wrote is not found again."""


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
        return self._encode(text, begin=True)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self) -> Callable[[int], str]:
        """Takes token after token, and gives the text that each adds: none, while a character is not whole."""
        from tokenizers.decoders import DecodeStream

        decoder, tokenizer = DecodeStream(skip_special_tokens=True), self._tokenizer.backend_tokenizer
        return lambda token: decoder.step(tokenizer, token) or ""

    @property
    def chat_template(self) -> str | None:
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else None

    def refuse_beyond(self, vocab_size: int) -> None:
        """Raises InputError for a token that a model of so many has no embedding for."""
        beyond = sorted((id, token) for token, id in self._tokenizer.get_vocab().items() if id >= vocab_size)
        if beyond:
            (id, token), more = beyond[0], f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
            raise InputError(
                f"{self.folder / 'tokenizer.json'} has token {id} ({token!r}){more}, the model's vocabulary ends at "
                f"{vocab_size - 1}",
                hint="take the tokenizer that this model was saved with, or remove the token where nothing uses it",
            )

    @property
    def named_ids(self) -> dict[str, int | None]:
        """Ids of the unknown and the padding token, None for one that there is not."""
        return {"unknown": self._tokenizer.unk_token_id, "padding": self._tokenizer.pad_token_id}

    @property
    def special_ids(self) -> frozenset[int]:
        """The tokens that mark structure and stand for no text: begin, end, headers, those held in reserve."""
        return frozenset(id for id, token in self._tokenizer.added_tokens_decoder.items() if token.special)

    def chat(self, message: str) -> list[int]:
        """Token ids of one user message in the model's chat template, ready for the assistant to answer.

        Raises InputError where there is no template, or where it fails.
        """
        return self.encode_rendered(self.render([{"role": "user", "content": message}]))

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a whole conversation (``role`` and ``content`` of each message) in the model's chat template.

        Raises InputError where there is no template, or where it fails or refuses these messages.
        """
        return self.encode_rendered(self.render(messages, answering=False))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered conversation, which has its begin token in it."""
        return self._encode(text, begin=False)

    def _encode(self, text: str, *, begin: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python's stand-in for a byte of the command line, or half a JSON escape
            raise InputError(
                f"the text has {text[error.start]!r} at character {error.start}, which is no Unicode character",
                hint="give text in UTF-8",
            ) from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=begin, verbose=False)
        return ids

    def render(self, messages: Sequence[Mapping[str, str]], *, answering: bool = True, date: str | None = None) -> str:
        """A conversation in the model's chat template; ``answering``: ready for the assistant to go on. ``date`` is
        what a template that names the day gets, where it is not to be today's.

        Raises InputError where there is no template, or where it fails or refuses these messages.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise InputError(
                f"the tokenizer in {self.folder} has no chat template, which messages need",
                hint="copy tokenizer_config.json or chat_template.jinja into the checkpoint, or give plain text",
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=answering,
                tokenize=False,
                **({"date_string": date} if date else {}),
            )
        # A template is a program: beside its own refusals it may fail as any expression does.
        except (TemplateError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise InputError(
                f"the chat template fails: {error}",
                hint="give messages in the order and the roles that this model was trained with",
            ) from error
        return text


def open_tokenizer(checkpoint: Path, *, cache: Path) -> Tokenizer:
    """The tokenizer of a checkpoint of any format. One that has to be converted is converted once, into a folder of
    ``cache``. Raises InputError."""
    if gguf_file.is_gguf(checkpoint):
        return Tokenizer(cached_tokenizer(checkpoint, cache))
    if not meta.is_meta(checkpoint) or (checkpoint / "tokenizer.json").exists():
        return Tokenizer(checkpoint)
    if not (checkpoint / TOKENIZER).exists():
        raise InputError(f"{checkpoint} has no {TOKENIZER}", hint="download it into this folder")
    behind = [_IMAGE] if meta.sees_images(checkpoint) else []
    kind = "-image" if behind else ""
    folder = cache / f"tokenizer-{_CONVERSION}{kind}-{sha256(checkpoint / TOKENIZER)[:16]}"
    if not folder.exists():
        write_tokenizer(checkpoint, folder, behind=behind)
    return Tokenizer(folder)
