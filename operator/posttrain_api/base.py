"""The base of every model of the contract: frozen, strict about names, camelCase on the wire.

Everything that travels between operator, trainer and command line is one of these models, so that both ends refuse the
same things. Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """A frozen record: unknown fields are refused, NaN and infinity too; field names are camelCase in JSON."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, allow_inf_nan=False
    )

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON types under the wire names; what is unset is left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def to_json(self) -> str:
        """Canonical JSON (sorted keys, no spaces): equal records give equal bytes."""
        return canonical_json(self.to_wire())


class Hashed(Model):
    """A record that is known by its hash. Not every one: several have a field called `digest`."""

    def digest(self) -> str:
        """`sha256:<hex>` of the canonical JSON."""
        return "sha256:" + hashlib.sha256(self.to_json().encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; ValueError on NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
