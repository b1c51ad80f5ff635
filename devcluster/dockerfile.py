"""Reads from a Dockerfile what a container inherits from its image: ENV, USER, WORKDIR, ENTRYPOINT of the last stage.

So the local images behave as the real ones are declared, and a wrong entrypoint or variable shows here, not first in a
registry. RUN and COPY are not carried out: the files come from the environment. Pure.
"""

import json
import re
import shlex
from dataclasses import dataclass, field


@dataclass
class Settings:
    """What the last stage sets."""

    environment: dict[str, str] = field(default_factory=dict)
    uid: int | None = None
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest.strip()) for word, _, rest in pairs]


def parse(text: str, prefix: str, folder: str) -> Settings:
    """Settings of the last stage, with `prefix` (the image's environment folder) replaced by `folder`.

    `$NAME` in a PATH stands for the base image's own and is left out.
    """
    settings = Settings()
    for word, rest in _instructions(text):
        value = rest.replace(prefix, folder)
        if word == "FROM":
            settings = Settings()
        elif word == "ENV":
            settings.environment |= dict(pair.split("=", 1) for pair in shlex.split(value))
        elif word == "USER":
            settings.uid = int(value.split(":")[0]) if value.split(":")[0].isdigit() else None
        elif word == "WORKDIR":
            settings.workdir = value
        elif word == "ENTRYPOINT":
            settings.entrypoint = [str(each) for each in json.loads(value)]
    return settings
