"""What tests do with an OpenAPI document: walk through its operations, validate by its schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator

Json = dict[str, Any]


class Documented(NamedTuple):
    """One operation."""

    method: str
    path: str
    says: Json

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def body(self) -> Json | None:
        content: Json | None = self.says.get("requestBody", {}).get("content", {}).get("application/json")
        return content

    def parameters(self, where: str) -> list[Json]:
        return [each for each in self.says["parameters"] if each["in"] == where]

    def examples(self, where: str) -> dict[str, str]:
        """Those of the parameters of one kind."""
        return {each["name"]: str(each["example"]) for each in self.parameters(where) if "example" in each}

    @property
    def url(self) -> str:
        """The path with the examples of its parts."""
        return self.path.format(**self.examples("path"))

    @property
    def bodies(self) -> dict[str, Json | None]:
        """Every example of a body; one that is None where there is none to send."""
        return {name: each["value"] for name, each in self.body["examples"].items()} if self.body else {"": None}


class Document:
    """A parsed document."""

    def __init__(self, json: Json) -> None:
        self.json = json

    @property
    def operations(self) -> Iterator[Documented]:
        for path, methods in self.json["paths"].items():
            for method, says in methods.items():
                yield Documented(method.upper(), path, says)

    def operation(self, method: str, path: str) -> Documented:
        return Documented(method, path, self.json["paths"][path][method.lower()])

    def answer(self, operation: Documented, status: int) -> Json | None:
        """What is documented for a status; None where it is not."""
        found: Json | None = operation.says["responses"].get(str(status))
        return self.resolved(found) if found else None

    def resolved(self, part: Json) -> Json:
        while "$ref" in part:
            found: Any = self.json
            for name in part["$ref"].removeprefix("#/").split("/"):
                found = found[name.replace("~1", "/")]
            part = found
        return part

    def complaints(self, schema: Json, value: Any) -> list[str]:
        """Why a value does not have a schema that allows nothing beside what it names."""
        closed = _closed({**schema, "components": self.json["components"]})
        return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(closed).iter_errors(value)]


def _closed(schema: Any) -> Any:
    """The same schema, where objects have no members but those that are named or explicitly allowed."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _closed(each) for name, each in schema.items()}
    if "properties" in schema and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made
