"""`python -m posttrain_operator`: the operator's process. Settings come from the environment (settings.py)."""

from __future__ import annotations

import asyncio
import sys

from posttrain_operator import logs
from posttrain_operator.app import run
from posttrain_operator.settings import SettingsError, read_settings


def main() -> int:
    """Exit code 0 after SIGTERM, 2 for settings that cannot be read, anything else to be started again."""
    try:
        settings = read_settings()
    except SettingsError as error:
        print(f"posttrain_operator: {error}", file=sys.stderr)
        return 2
    logs.configure(settings)
    return asyncio.run(run(settings))


if __name__ == "__main__":
    sys.exit(main())
