"""JSON schemas of the types that validate requests and of those that describe answers."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from pydantic_core import core_schema

Json = dict[str, Any]
PLACE = "#/components/schemas/{model}"


def schemas_of(wanted: Iterable[tuple[Any, JsonSchemaMode]]) -> tuple[dict[tuple[int, JsonSchemaMode], Json], Json]:
    """The schema of each type, by its ``id()``, and the named ones that these refer to."""
    inputs = [((id(type_), mode), mode, TypeAdapter(type_)) for type_, mode in wanted]
    made, rest = TypeAdapter.json_schemas(inputs, ref_template=PLACE, schema_generator=_Generator)
    return {key: schema for (key, _), schema in made.items()}, rest.get("$defs", {})


class _Generator(GenerateJsonSchema):
    """Takes the texts below attributes as descriptions, and leaves out titles that only repeat a name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> Json:
        return _described(super().model_schema(schema), schema["cls"])

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> Json:
        made = super().typed_dict_schema(schema)
        cls = schema.get("cls")
        return made if cls is None else _described(made, cls)


def _described(schema: Json, cls: type[Any]) -> Json:
    schema.pop("title", None)
    if "description" in schema:
        schema["description"] = plain(schema["description"])
    texts = attribute_texts(cls)
    for name, member in schema.get("properties", {}).items():
        if name in texts:
            member.setdefault("description", texts[name])
        if member.get("default", ...) is None:
            del member["default"]
    return schema


def plain(text: str) -> str:
    """A docstring as Markdown in one line."""
    return " ".join(inspect.cleandoc(text).split()).replace("``", "`")


def attribute_texts(cls: type[Any]) -> dict[str, str]:
    """The strings that stand below the attributes of a class and its bases."""
    texts: dict[str, str] = {}
    # A TypedDict has no bases at run time but those it was written with.
    for base in (*getattr(cls, "__orig_bases__", ()), *cls.__bases__):
        if isinstance(base, type) and base.__module__.startswith("llmstream."):
            texts |= attribute_texts(base)
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):  # installed without its source
        return texts
    assert isinstance(node, ast.ClassDef)
    for attribute, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(attribute, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[ast.unparse(attribute.target)] = plain(str(text.value.value))
    return texts
