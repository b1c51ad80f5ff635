"""Modules that cost seconds to import and that most processes of a job never use.

peft brings bitsandbytes and half of torch's compiler with it: of seven CPU seconds that `prepare` takes to start, four
for nothing where the job has no adapter.
"""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """Stands for a module and imports it when one of its names is first asked for.

    Not importlib.util.LazyLoader: that one leaves an unfinished module in sys.modules, and `inspect`, which torch uses
    while it is itself imported, walks over all of them.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
