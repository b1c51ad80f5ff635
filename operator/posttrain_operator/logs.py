"""Logging: text for people, or one JSON object a line. Called once, before anything else."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from posttrain_operator.settings import Settings

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_NOISY = {"kopf.objects": logging.WARNING, "aiohttp.access": logging.WARNING, "asyncio": logging.WARNING}
"""kopf logs every event that was handled; aiohttp every request."""


class JsonFormatter(logging.Formatter):
    """One line: time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure(settings: Settings) -> None:
    """Replaces all handlers of the root logger by one on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name, level in _NOISY.items():
        logging.getLogger(name).setLevel(max(level, root.level))
