"""A chat template told as text around messages: what is told renders as Jinja does, and what cannot be is not told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.chat import CONVERSATIONS, ChatFormat, find_format, golden_chats
from exporter.errors import InputError

HEADERS = """{{ bos }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}
{%- if answering %}<|start|>assistant<|end|>\n\n{% endif %}"""
"""Llama 3: a header before every message."""

DATED = """{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif -%}
{{ bos }}<|start|>system<|end|>\n\nToday Date: {{ date }}\n\n{{ system }}<|eot|>
{%- for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}
{%- if answering %}<|start|>assistant<|end|>\n\n{% endif %}"""
"""Llama 3.1 and later: a system message even where none is given."""

INSTRUCTIONS = """{% if messages[0].role == 'system' %}
{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}
{%- for m in messages %}{% if m.role == 'user' %}{{ bos }}[INST] {% if loop.first %}{{ system }}{% endif %}
{{- m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos }}{% endif %}{% endfor %}"""
"""Llama 2: the system message inside the first of the user, and nothing to ask for an answer. A system message keeps
its white space, which no format tells."""

INSTRUCTIONS_TRIMMED = INSTRUCTIONS.replace("messages[0].content +", "messages[0].content | trim +")
UNTRIMMED = HEADERS.replace(" | trim", "")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ refuse() }}{% endif %}" + HEADERS
COUNTING = HEADERS.replace("<|start|>{{", "<|start|>{{ messages | length }}{{")
SHOUTING = HEADERS.replace("| trim", "| upper")


def renderer(template: str) -> Callable[[Sequence[Mapping[str, str]]], str]:
    def refuse() -> str:
        raise InputError("no system message", hint="leave it out")

    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    return lambda messages: compiled.render(
        messages=list(messages), bos="<s>", eos="</s>", date="26 Jul 2024", answering=True, refuse=refuse
    )


def found(template: str) -> ChatFormat:
    result = find_format(renderer(template))
    assert result is not None
    return result


TOLD = {"headers": HEADERS, "dated": DATED, "instructions": INSTRUCTIONS_TRIMMED, "untrimmed": UNTRIMMED}


@pytest.mark.parametrize("template", TOLD.values(), ids=TOLD)
@settings(deadline=None)
@given(contents=st.lists(st.text(), min_size=1, max_size=4), system=st.none() | st.text())
def test_a_format_renders_any_conversation_as_the_template_does(
    template: str, contents: list[str], system: str | None
) -> None:
    contents = contents if len(contents) % 2 else contents[:-1] or ["x"]
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    assert found(template).render(messages) == renderer(template)(messages)


@pytest.mark.parametrize("template", [COUNTING, SHOUTING, INSTRUCTIONS], ids=["counting", "shouting", "half trimmed"])
def test_a_template_that_is_no_format_gives_none(template: str) -> None:
    assert find_format(renderer(template)) is None


def test_a_template_without_system_messages_gives_a_format_that_refuses_them() -> None:
    result = found(NO_SYSTEM)
    assert result.system_user is None
    with pytest.raises(InputError, match="takes no system message"):
        result.render(CONVERSATIONS[2])
    kept = [messages for messages, _ in golden_chats(renderer(NO_SYSTEM))]
    assert kept == [messages for messages in CONVERSATIONS if messages[0]["role"] != "system"]


@pytest.mark.parametrize("roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"], ["system"]])
def test_roles_in_another_order_are_refused_by_name(roles: list[str]) -> None:
    with pytest.raises(InputError, match="the roles of the messages are " + (", ".join(roles) or "none")):
        found(HEADERS).render([{"role": role, "content": "x"} for role in roles])
