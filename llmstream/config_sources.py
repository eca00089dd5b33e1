"""Where settings come from: a YAML file, the environment, flags. Each value remembers its origin for error messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from llmstream.config_schema import OBJECTS, Key, Schema, schema_of, shown
from llmstream.errors import ConfigError

PREFIX = "LLMSTREAM_"
CONFIG_VARIABLE = "LLMSTREAM_CONFIG"
CLIENT_VARIABLE = "LLMSTREAM_API_KEY"
"""What our own commands show to a server; no setting."""
ALIASES: Mapping[str, Key] = {
    "REDIS_URL": ("store", "url"),
    "REDIS_HOST": ("store", "host"),
    "REDIS_PORT": ("store", "port"),
    "PORT": ("server", "port"),
    "API_KEYS": ("security", "api_key"),
    "LLM_SYSTEM_PROMPT": ("question", "system_prompt"),
    "LLM_TEMPERATURE": ("question", "temperature"),
    "LLM_MAX_TOKENS": ("question", "max_tokens"),
    "REQUEST_TIMEOUT": ("question", "timeout_s"),
    "UVICORN_WORKERS": ("server", "workers"),
    "CELERY_CONCURRENCY": ("scheduler", "remote_slots"),
    "CELERY_LOGLEVEL": ("logging", "level"),
    "APP__NAME": ("server", "name"),
    "APP__HOST": ("server", "host"),
    "APP__PORT": ("server", "port"),
    "BROKER": ("broker", "kind"),
    "RABBITMQ_URL": ("broker", "url"),
    "RABBIT_MQ_HOST": ("broker", "host"),
    "RABBIT_MQ_PORT": ("broker", "port"),
    "RABBIT_MQ_LOGIN": ("broker", "login"),
    "RABBIT_MQ_PASSWORD": ("broker", "password"),
    "QUEUE_NAME": ("broker", "queue"),
    "REDIS_PREFIX": ("broker", "result_prefix"),
}
SECTIONS: Mapping[str, str] = {"app": "server"}
"""What sections of a file are called elsewhere."""
KUBERNETES = frozenset({"PORT", "REDIS_PORT", "RABBIT_MQ_PORT"})
"""Set by it to ``tcp://…`` in every pod beside Services named llmstream, redis and rabbit-mq."""

Model = TypeVar("Model", bound=BaseModel)


class Found(NamedTuple):
    """A value somebody set, and where."""

    value: Any
    origin: str
    folder: Path = Path()
    """What a relative ``file:`` reference starts from."""


Values = dict[Key, Found]


Derive = Callable[[Values, Mapping[str, str]], Values]
"""Makes of the values so far and the environment further ones, which go before those of the file only."""


def build(
    model: type[Model], file: Path | None, env: Mapping[str, str], flags: Mapping[str, Any], derive: Derive
) -> Model:
    """Merges defaults < file < environment < flags. Raises one ConfigError that lists everything wrong with them."""
    schema = schema_of(model)
    problems: list[str] = []
    if file is None and env.get(CONFIG_VARIABLE):
        file = Path(env[CONFIG_VARIABLE])
    values = YamlFile(file.expanduser(), schema, problems).values() if file else {}
    own = from_environment(schema, env, list(values), problems) | from_flags(schema, flags, problems)
    values |= derive(values | own, env) | own
    nested = nest({key: resolve(key, found, schema, env, problems) for key, found in values.items()})
    try:
        settings = model.model_validate(nested)
    except ValidationError as error:
        problems += explain(error, schema, values)
    if problems:
        raise ConfigError("The configuration is wrong:\n" + "\n".join(f"  {line}" for line in dict.fromkeys(problems)))
    return settings


class YamlFile:
    """One YAML file: safe types only, no key twice, no key that we do not know."""

    def __init__(self, file: Path, schema: Schema, problems: list[str]) -> None:
        self._file = file
        self._schema = schema
        self._problems = problems

    def values(self) -> Values:
        """Reads the file; what is wrong with it goes to the list of problems."""
        try:
            with self._file.open("rb") as stream:
                self._loader = yaml.SafeLoader(stream)
                root = self._loader.get_single_node()
                return dict(self._walk(root, ())) if root else {}
        except OSError as error:
            self._problems.append(f"{self._file}: the configuration file cannot be read: {error.strerror}")
        except yaml.MarkedYAMLError as error:
            self._problems.append(f"{self._at(error.problem_mark)}: not valid YAML: {error.problem}")
        except yaml.YAMLError as error:
            self._problems.append(f"{self._file}: not valid YAML: {error}")
        return {}

    def _walk(self, node: yaml.Node, parent: Key) -> Iterator[tuple[Key, Found]]:
        if not isinstance(node, yaml.MappingNode):
            if node.tag != "tag:yaml.org,2002:null":
                name = ".".join(parent) or "the file"
                known = ", ".join(self._schema.children(parent))
                self._problems.append(
                    f"{self._at(node.start_mark)}: {name} must be a mapping with keys such as {known}"
                )
            return
        self._refuse_duplicates(node, {} if parent else SECTIONS)
        self._loader.flatten_mapping(node)
        for key_node, value_node in node.value:
            name = str(key_node.value)
            key = (*parent, name) if parent else (SECTIONS.get(name, name),)
            found = Found(None, self._at(key_node.start_mark), self._file.parent)
            if self._schema.find(key):
                yield key, found._replace(value=self._loader.construct_object(value_node, deep=True))
            elif self._schema.children(key):
                if len(key) > 1:
                    yield key, found._replace(value={})
                yield from self._walk(value_node, key)
            else:
                self._problems.append(f"{self._at(key_node.start_mark)}: {self._schema.unknown(key)}")

    def _refuse_duplicates(self, node: yaml.MappingNode, aliases: Mapping[str, str]) -> None:
        first: dict[str, tuple[str, yaml.Mark]] = {}
        for key_node, _ in node.value:
            name = str(key_node.value)
            meant = aliases.get(name, name)
            if meant in first:
                before, mark = first[meant]
                said = "it" if before == name else f"{before!r}, which is the same,"
                here = self._at(key_node.start_mark)
                self._problems.append(f"{here}: {name!r} is here twice; {said} was set on line {mark.line + 1} before")
            first.setdefault(meant, (name, key_node.start_mark))

    def _at(self, mark: yaml.Mark | None) -> str:
        return f"{self._file}:{mark.line + 1}" if mark else str(self._file)


def from_environment(schema: Schema, env: Mapping[str, str], known: Iterable[Key], problems: list[str]) -> Values:
    """Reads ``SECTION__KEY`` variables, with or without ``LLMSTREAM_``, and the aliases; ignores all others.

    The longer spelling of the same setting wins. Empty variables count as absent, as compose files produce them.
    """
    names = {(key[0], _spelled(key[1])): key[1] for key in known if schema.sections.get(key[0]) and len(key) > 1}
    values: Values = {}
    for variable in sorted(env, key=lambda name: (name.startswith(PREFIX), name not in ALIASES, name)):
        value, bare = env[variable], variable.removeprefix(PREFIX)
        if not value or variable in (CONFIG_VARIABLE, CLIENT_VARIABLE) or bare != bare.upper():
            continue
        key = _key_of(schema, bare)
        if key is None:
            if bare != variable and (near := _near(schema, bare)):
                problems.append(f"{variable}: unknown variable; did you mean {PREFIX}{near}?")
        elif bare in KUBERNETES and "://" in value and (bare != variable or bare != "PORT"):
            continue
        elif not schema.find(key):
            problems.append(f"{variable}: {schema.unknown(key)}")
        else:
            if len(key) > 2:
                key = (key[0], names.get((key[0], _spelled(key[1])), key[1]), *key[2:])
            values[key] = Found(value, f"environment variable {variable}")
    return values


def _key_of(schema: Schema, bare: str) -> Key | None:
    if bare in ALIASES:
        return ALIASES[bare]
    words = bare.lower().split("__")
    if len(words) == 1:
        return (words[0],) if schema.find((words[0],)) else None
    return schema.key(words, "__") if words[0] in schema.sections else None


def _near(schema: Schema, bare: str) -> str | None:
    section, joint, rest = bare.partition("__")
    if joint:
        near = difflib.get_close_matches(section.lower(), schema.sections, n=1, cutoff=0)
        return f"{near[0].upper()}__{rest}"
    singles = [key[0].upper() for key in schema.settings if len(key) == 1]
    return next(iter(difflib.get_close_matches(bare, [*singles, "CONFIG", "REDIS_URL"], n=1, cutoff=0.8)), None)


def _spelled(name: str) -> str:
    """A name as a variable can spell it: ``Qwen2.5-0.5B`` is ``QWEN2_5_0_5B``."""
    return re.sub(r"[^A-Z0-9]+", "_", name.upper())


def from_flags(schema: Schema, flags: Mapping[str, Any], problems: list[str]) -> Values:
    """Takes dotted keys such as ``server.port``; None means that the flag was not given."""
    values: Values = {}
    for flag, value in flags.items():
        key = schema.key(flag.split("."), ".")
        if value is None:
            continue
        if schema.find(key):
            values[key] = Found(value, "command line")
        else:
            problems.append(f"command line: {schema.unknown(key)}")
    return values


def resolve(key: Key, found: Found, schema: Schema, env: Mapping[str, str], problems: list[str]) -> Any:
    """Replaces a secret's ``env:VARIABLE`` or ``file:PATH`` by what it refers to."""
    setting = schema.find(key)
    if setting is None or not setting.secret or not isinstance(found.value, str):
        return found.value
    where = f"{'.'.join(key)} = {found.value} ({found.origin})"
    kind, _, target = found.value.partition(":")
    if kind == "env":
        if not env.get(target):
            problems.append(f"{where}: the environment variable {target} is not set")
        return env.get(target)
    if kind == "file":
        try:
            text = (found.folder / Path(target).expanduser()).read_text().strip()
        except (OSError, ValueError) as error:
            problems.append(f"{where}: the file cannot be read: {getattr(error, 'strerror', None) or error}")
            return None
        if not text:
            problems.append(f"{where}: the file is empty")
        return text
    return found.value


def nest(values: Mapping[Key, Any]) -> dict[str, Any]:
    """Turns ``{("server", "port"): 1}`` into ``{"server": {"port": 1}}``."""
    nested: dict[str, Any] = {}
    for key in sorted(values, key=len):
        inner = nested
        for word in key[:-1]:
            inner = inner.setdefault(word, {})
        inner[key[-1]] = values[key]
    return nested


def explain(error: ValidationError, schema: Schema, values: Values) -> Iterator[str]:
    """One line for each thing wrong: the key, the value, where it was set and what is allowed."""
    for detail in error.errors(include_url=False):
        path = tuple(str(word) for word in detail["loc"])
        key = next((path[:end] for end in range(len(path), 0, -1) if schema.find(path[:end])), path)
        setting, found = schema.find(key), values.get(key)
        reason = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else None
        if setting is None:
            yield from (reason or detail["msg"]).splitlines()
        elif detail["type"] == "missing":
            yield f"{'.'.join(key)} is required: {setting.meaning}"
        elif found is not None:
            if setting.allowed == OBJECTS and reason is None:
                reason = f"{OBJECTS}; {'.'.join(path[len(key) :]) or 'it'}: {detail['msg']}"
            value = shown(found.value, setting.secret)
            yield f"{'.'.join(key)} = {value} ({found.origin}): expected {reason or setting.allowed}"
