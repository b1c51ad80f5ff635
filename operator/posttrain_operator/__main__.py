"""`python -m posttrain_operator`: the operator's process. Settings come from the environment (settings.py)."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from posttrain_operator import logs
from posttrain_operator.app import run
from posttrain_operator.process import tune
from posttrain_operator.settings import Settings, SettingsError, read_settings

_PATIENCE = 1.0


def main() -> int:
    """Exit code 0 after SIGTERM, 2 for settings that cannot be read, anything else to be started again."""
    try:
        settings = read_settings()
    except SettingsError as error:
        print(f"posttrain_operator: {error}", file=sys.stderr)
        return 2
    logs.configure(settings)
    tune()
    return asyncio.run(_whole(settings))


async def _whole(settings: Settings) -> int:
    """Runs the operator and ends the process itself where something cannot be cancelled: watchers of a kopf that has
    failed."""
    code = await run(settings)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left and (await asyncio.wait(left, timeout=_PATIENCE))[1]:
        logging.shutdown()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
