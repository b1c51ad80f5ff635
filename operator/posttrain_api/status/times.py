"""Times on the wire: RFC 3339 in UTC, a Kubernetes `date-time`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

RFC3339 = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
