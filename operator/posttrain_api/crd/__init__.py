"""The CRD, generated from the models; `crd()` is the document, `python -m posttrain_api.crd` keeps its copies."""

from __future__ import annotations

from posttrain_api.crd.document import crd

__all__ = ["crd"]
