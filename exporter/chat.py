"""A chat template told without Jinja, which phones do not have: the text around each message, found by probes.

A template is a program, and no one can tell for sure what it does. So the format is proven on conversations that the
probes did not see, and none is given where a template does something else: an app then shows what the goldens hold, or
brings a renderer of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from exporter.errors import InputError

Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]
"""A conversation as text, ready for the assistant to answer; raises InputError where the template refuses it."""

CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "What news?"},),
    ({"role": "user", "content": "  Two\n\nlines: naïve, 東京 🙂 {x} <b>  "},),
    ({"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "What is 2 + 2?"}),
    (
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": " Hello, what can I do? "},
        {"role": "user", "content": "Count to three."},
        {"role": "assistant", "content": "1 2 3"},
        {"role": "user", "content": "Thank you\n"},
    ),
    (
        {"role": "system", "content": "\tBe brief. "},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye."},
    ),
)
"""What a bundle keeps as golden renders: one turn and several, with and without a system message, odd white space."""

GOLDEN_DATE = "26 Jul 2024"
"""What templates that name the day get (Llama 3.1's own default), so that an export is the same on every day."""

_SYSTEM, _USER, _ASSISTANT, _NEXT = "probe-system", "probe-user", "probe-assistant", "probe-next"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """What stands before, between and after the messages of a conversation."""

    trims: bool
    """Whether white space at both ends of a message is dropped."""
    user: tuple[str, str]
    """Around the first message of the user, where there is no system message."""
    system_user: tuple[str, str, str] | None
    """Before the system message, between it and the first of the user, and after that; None where it is refused."""
    assistant: tuple[str, str]
    next_user: tuple[str, str]
    answer: str
    """At the end, where the assistant is to go on."""

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation: a system message or none, then user and assistant in turn, the user last.

        Raises InputError for any other order.
        """
        roles = [message["role"] for message in messages]
        contents = [message["content"].strip() if self.trims else message["content"] for message in messages]
        text = ""
        if roles[:1] == ["system"]:
            if self.system_user is None:
                raise InputError("the chat template of this model takes no system message", hint="leave it out")
            text, roles, contents = self.system_user[0] + contents[0], roles[1:], contents[1:]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise InputError(
                f"the roles of the messages are {', '.join(m['role'] for m in messages) or 'none'}",
                hint="system or none, then user and assistant in turn, the user last",
            )
        before, after = self.system_user[1:] if text and self.system_user else self.user
        text += before + contents[0] + after
        for role, content in zip(roles[1:], contents[1:], strict=True):
            before, after = self.assistant if role == "assistant" else self.next_user
            text += before + content + after
        return text + self.answer


def find_format(render: Render) -> ChatFormat | None:
    """The format of a template, or None where it cannot be told so. ``render`` without a prompt for the assistant is
    not needed: what all renders end with is that prompt and what stands after the user's last message."""
    try:
        found = _probe(render)
        matches = all(_same(found, render, messages) for messages in CONVERSATIONS)
    except (InputError, ValueError):  # refused, or a probe that is not in its own render
        return None
    return found if matches else None


def golden_chats(render: Render) -> list[tuple[Sequence[Message], str]]:
    """Those of ``CONVERSATIONS`` that the template takes, each with its text."""
    chats: list[tuple[Sequence[Message], str]] = []
    for messages in CONVERSATIONS:
        try:
            chats.append((messages, render(messages)))
        except InputError:
            continue  # a template may refuse a system message
    return chats


def _probe(render: Render) -> ChatFormat:
    user = {"role": "user", "content": _USER}
    turns = [user, {"role": "assistant", "content": _ASSISTANT}, {"role": "user", "content": _NEXT}]
    before_user, tail = _around(render([user]), _USER)
    first, rest = _around(render(turns), _USER)
    between, rest = _around(rest, _ASSISTANT)
    before_next, next_tail = _around(rest, _NEXT)
    if first != before_user:
        raise ValueError("a first message changes with those that follow")
    # `tail` is the user's end and the prompt to answer; `between` the user's end and the assistant's beginning.
    after_user = _common_prefix(tail, between)
    answer = tail.removeprefix(after_user)
    after_next = next_tail.removesuffix(answer)
    try:
        system = render([{"role": "system", "content": _SYSTEM}, user])
    except InputError:
        system_user = None
    else:
        before_system, rest = _around(system, _SYSTEM)
        middle, after = _around(rest, _USER)
        system_user = before_system, middle, after.removesuffix(answer)
    # Between two messages the assistant's end and the user's beginning cannot be told apart, and need not be.
    return ChatFormat(
        trims=render([{"role": "user", "content": f" {_USER} "}]) == render([user]),
        user=(before_user, after_user),
        system_user=system_user,
        assistant=(between.removeprefix(after_user), ""),
        next_user=(before_next, after_next),
        answer=answer,
    )


def _same(found: ChatFormat, render: Render, messages: Sequence[Message]) -> bool:
    try:
        wanted = render(messages)
    except InputError:
        return messages[0]["role"] == "system" and found.system_user is None
    return found.render(messages) == wanted


def _around(text: str, probe: str) -> tuple[str, str]:
    """What stands before and after ``probe``. Raises ValueError where it is not there exactly once."""
    before, after = text.split(probe)
    return before, after


def _common_prefix(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
