"""Text to tokens and back by the bundle's tokenizer, and conversations by its chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypedDict

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from llamabundle.bundle import Bundle

GOLDEN_DATE = "26 Jul 2024"
"""The day in golden chats whose template names one."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class Text:
    """What stands between a person and the model's tokens."""

    def __init__(self, bundle: Bundle) -> None:
        self._tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer.json")))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = bundle.read_json("tokenizer_config.json") if bundle.find("tokenizer_config.json") else {}
        self._special = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, str | dict)
        }
        path = bundle.find("chat_template.jinja")
        self._template = _compile(path.read_text(encoding="utf-8")) if path else None

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def encode(self, text: str, *, bare: bool = True) -> list[int]:
        """Token ids. ``bare``: of a text to be continued as it stands, with the begin token in front; else of a
        rendered conversation, which has it in its text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=bare).ids
        return ids

    def render(self, messages: Sequence[Message], *, date: str | None = None) -> list[int]:
        """Token ids of a conversation, ready for the model to answer."""
        return self.encode(self.render_text(messages, date=date), bare=False)

    def render_text(self, messages: Sequence[Message], *, date: str | None = None) -> str:
        """A conversation in the model's chat template; ``date`` in place of today for one that names the day.

        Raises ValueError where there is no template, or where it does not take these messages.
        """
        if self._template is None:
            raise ValueError("this model has no chat template: ask for /v1/completions")
        day = {"date_string": date} if date else {}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special, **day)
        # A template is a program: beside its own refusals it may fail as any expression does.
        except (TemplateError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error

    def stream(self) -> Callable[[int], str]:
        """Takes token after token, and gives the text that each adds: none while a character is not whole."""
        decoder = DecodeStream(skip_special_tokens=True)
        return lambda token: decoder.step(self._tokenizer, token) or ""

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def _compile(source: str) -> Template:
    """With what templates are written for, by the custom that transformers began: a template may refuse, tell the time
    and write JSON as it is. It comes from a stranger, so it runs in Jinja's sandbox."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
