"""What can be configured: the keys of a settings model, what each allows, and how values are shown."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, quote, urlsplit

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

MASK = "********"
NAME = "NAME"
"""Stands for the name the user chooses, in keys such as ``models.NAME.slots``."""

OBJECTS = "a list of objects"

Key = tuple[str, ...]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads ``port: yes`` as true, which pydantic would take for 1.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation not in (bool, bool | None):
            raise PydanticCustomError("truth_value", "a truth value is not allowed here")
        return value


def comma_separated(value: Any) -> Any:
    """A list that may be written as one text."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


class Setting(NamedTuple):
    """One thing that can be set, in the words of the README's table."""

    key: str
    default: str
    meaning: str
    allowed: str
    secret: bool


class Schema:
    """The keys of a settings model: values, sections of values, and mappings from a user's name to a section."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.sections: dict[str, bool] = {}
        """Whether each section is a mapping from names that the user chooses."""
        self.settings: dict[Key, Setting] = dict(self._walk(model.model_json_schema()))

    def _walk(self, schema: dict[str, Any]) -> Iterator[tuple[Key, Setting]]:
        for name, value in schema["properties"].items():
            inner = value.get("additionalProperties")
            reference = (inner or value).get("$ref")
            if reference is None:
                yield (name,), _setting((name,), value)
                continue
            self.sections[name] = inner is not None
            start = (name, NAME) if inner else (name,)
            for key, leaf in schema["$defs"][reference.rpartition("/")[2]]["properties"].items():
                yield (*start, key), _setting((*start, key), leaf)

    def key(self, words: list[str], joint: str) -> Key:
        """Makes a key of words that were split at ``joint``, which a user's name in the middle may contain as well."""
        if self.sections.get(words[0]) and len(words) > 3:
            return (words[0], joint.join(words[1:-1]), words[-1])
        return tuple(words)

    def find(self, key: Key) -> Setting | None:
        """Looks up a key with the user's names in it; None when there is no such setting."""
        return self.settings.get(self._generic(key))

    def children(self, key: Key) -> list[str]:
        """The keys that can stand below a section."""
        parent = self._generic(key)
        below = (setting[len(parent)] for setting in self.settings if setting[: len(parent)] == parent != setting)
        return list(dict.fromkeys(below))

    def unknown(self, key: Key) -> str:
        """Says why there is no such setting and which one may have been meant."""
        for depth, word in enumerate(key):
            known = self.children(key[:depth])
            if not known:
                return f"{'.'.join(key)}: {'.'.join(key[:depth])} holds a value, nothing is below it"
            if word not in known and known != [NAME]:
                near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                return f"{'.'.join(key[: depth + 1])}: unknown setting; {hint}known: {', '.join(known)}"
        return f"{'.'.join(key)}: set one of {', '.join(self.children(key))}"

    def _generic(self, key: Key) -> Key:
        return (key[0], NAME, *key[2:]) if len(key) > 1 and self.sections.get(key[0]) else key


@cache
def schema_of(model: type[BaseModel]) -> Schema:
    return Schema(model)


def _setting(key: Key, value: Mapping[str, Any]) -> Setting:
    variants = value.get("anyOf", [value])
    default = value.get("default", "required")
    if not isinstance(default, str):
        default = json.dumps(default)
    return Setting(
        key=".".join(key),
        default=default,
        meaning=" ".join(value.get("description", "").split()),
        allowed=" or ".join(_allowed(variant) for variant in variants),
        secret=any(variant.get("format") == "password" for variant in variants),
    )


def _allowed(variant: Mapping[str, Any]) -> str:
    if "enum" in variant:
        return "one of " + ", ".join(map(str, variant["enum"]))
    kind = variant.get("format") or variant["type"]
    if choices := variant.get("items", {}).get("enum"):
        return "a list of " + ", ".join(choices)
    words = {
        "integer": "an integer",
        "number": "a number",
        "string": "text",
        "path": "a path",
        "password": "text, env:VARIABLE or file:PATH",
        "array": "a list of texts",
        "date-time": "a date, or a date and time such as 2030-01-31T12:00:00Z",
        "null": "null",
        "boolean": "true or false",
    }
    pattern = f" that matches {variant['pattern']}" if "pattern" in variant else ""
    if "$ref" in variant.get("items", {}):
        return OBJECTS
    return words[kind] + _limits(variant) + pattern


def _limits(variant: Mapping[str, Any]) -> str:
    low, above, high = (variant.get(bound) for bound in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    if above is not None:
        return f" above {above:g}"
    return f" of at least {low:g}" if low is not None else ""


def shown(value: Any, secret: bool) -> str:
    """A value as an error message shows it: short, without secrets."""
    if secret:
        return MASK
    text = "null" if value is None else repr(mask_url(value) if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(value: Any) -> Any:
    """A settings value as YAML data, without secrets."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return mask_url(secret) if re.match(r"(rediss?|unix|amqps?)://", secret) else MASK
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return mask_url(value) if isinstance(value, str) else value


def mask_url(text: str) -> str:
    """Hides the password of a URL, also one among its parameters; other text comes back as it is."""
    if not re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return MASK
    user, _, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    query = _mask_query(parts.query)
    if not colon and query == parts.query:
        return text
    netloc = f"{name}:{MASK}@{host}" if colon else parts.netloc
    return parts._replace(netloc=netloc, query=query).geturl()


def _mask_query(query: str) -> str:
    fields = parse_qsl(query, keep_blank_values=True)
    if not any(_tells(name) for name, _ in fields):
        return query
    return "&".join(f"{quote(name)}={MASK if _tells(name) else quote(value)}" for name, value in fields)


def _tells(name: str) -> bool:
    return any(word in name.lower() for word in ("password", "secret", "token", "key"))


def split_url(url: str) -> SplitResult | None:
    """The parts of a URL; None for what is none."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises ValueError where it is no number
    except ValueError:
        return None
    return parts
