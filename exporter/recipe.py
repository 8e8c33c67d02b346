"""A recipe: the choices of a run in a TOML file, one that may extend another, and what a run has made of them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tomli_w

from exporter.errors import InputError
from exporter.planning import Choices, choices_of
from exporter.spec import Plan

FILE_NAME = "recipe.toml"
EXTENDS = "extends"
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_EITHER = {"group-size": ("integer",)}
"""Keys that may be written in another type as well: a number reads better without quotes."""


def asked_for(**options: Any) -> Choices:
    """Of the options of a command line those that were given."""
    given: Any = {name: value for name, value in options.items() if value is not None}
    chosen: Choices = given
    return chosen


def read_recipe(path: Path) -> Choices:
    """The choices of a recipe over those of the one it extends (a path beside it). Raises InputError for a file that is
    none, a key that is unknown and a value of another type."""
    return _read(path, seen=())


def _read(path: Path, *, seen: tuple[Path, ...]) -> Choices:
    here = path.resolve()
    if here in seen:
        raise InputError(f"recipe {path} extends itself", hint=f"remove {EXTENDS} from one of them")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is no TOML: {error}", hint="for instance: target = 'coreml'") from error
    base = content.pop(EXTENDS, None)
    if base is not None and not isinstance(base, str):
        raise InputError(f"recipe {path}: {EXTENDS} is {base!r}, a path was expected", hint="name one other recipe")
    properties = schema()["properties"]
    for key, value in content.items():
        if key not in properties:
            raise InputError(
                f"recipe {path}: {key} is unknown; known: {', '.join(properties)}", hint="keys are options without --"
            )
        _check(value, properties[key], place=f"recipe {path}: {key}")
    own: Any = {key.replace("-", "_"): str(value) if key in _EITHER else value for key, value in content.items()}
    inherited = _read(path.parent / base, seen=(*seen, here)) if base else {}
    choices: Choices = {**inherited, **own}
    return choices


def write_recipe(folder: Path, plan: Plan, *, target: str) -> None:
    """``recipe.toml``: what this run was for one target, every default told, so that it can be run again."""
    chosen = choices_of(replace(plan, targets=(target,)))
    content = {key.replace("_", "-"): value for key, value in chosen.items()}
    (folder / FILE_NAME).write_bytes(tomli_w.dumps(content).encode())


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file, for editors."""
    properties: dict[str, Any] = {
        EXTENDS: {"type": "string", "description": "A recipe whose choices hold where this one has none."}
    }
    for name, kind in get_type_hints(Choices).items():
        key = name.replace("_", "-")
        if get_origin(kind) is list:
            properties[key] = {"type": "array", "items": {"type": _TYPES[get_args(kind)[0]]}}
        else:
            properties[key] = {"type": [_TYPES[kind], *_EITHER[key]] if key in _EITHER else _TYPES[kind]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of llama-export",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _check(value: Any, wanted: Mapping[str, Any], *, place: str) -> None:
    kinds = wanted["type"] if isinstance(wanted["type"], list) else [wanted["type"]]
    python: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
    }
    fits = any(isinstance(value, python[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds)
    if fits and isinstance(value, list):
        (item_kind,) = python[wanted["items"]["type"]]
        fits = all(type(item) is item_kind for item in value)
    if not fits:
        raise InputError(f"{place} is {value!r}, {' or '.join(kinds)} was expected", hint="see docs/recipe.schema.json")
