"""The groups of a step: drawn, and, with dynamic sampling, drawn again until enough of them teach something.

Called by the collector. A group whose samples all got the same reward has advantage 0 throughout; dynamic sampling
(Yu et al. 2025, DAPO §3.2) leaves it out and takes the next prompts instead, so the place in the order of prompts is
state of its own. Nothing is ever drawn that is not needed, so nothing is left over for the next step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from posttrain_trainer.advantages import teaching
from posttrain_trainer.drawing import Drawer, Drawn, Order
from posttrain_trainer.experience import Experience, joined
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.steps import Visit


@dataclass(frozen=True)
class Groups:
    """Draws steps. max_refills: how often groups without variance are replaced; 0: they are trained on."""

    drawer: Drawer
    sampler: Sampler
    group_size: int
    max_refills: int = 0

    def draw(self, visit: Visit, cursor: int) -> tuple[Drawn, int] | None:
        """The step's samples and the place of the next prompt; None where the ranks agreed to stop."""
        wanted = self.sampler.consumed(visit.step + 1) - self.sampler.consumed(visit.step)
        kept: list[Drawn] = []
        missing, refills = wanted, self.max_refills
        while True:
            drawn = self._drawn(visit, cursor, missing)
            if drawn is None:
                return None
            cursor += missing
            if not self.max_refills:
                return drawn, cursor
            kept.append(_only(drawn, varied(drawn.experience)))
            missing = wanted - sum(part.experience.groups for part in kept)
            if not missing or not refills:
                break
            refills -= 1
        # Nothing to learn anywhere: the step shows it, its gradient is 0.
        return (together(kept) if missing < wanted else drawn), cursor

    def _drawn(self, visit: Visit, cursor: int, prompts: int) -> Drawn | None:
        places = np.arange(cursor, cursor + prompts)
        order = Order(self.sampler.at(places), places, self.group_size, visit.step)
        return self.drawer.draw(order, visit.stopping, visit.phases)


def varied(experience: Experience) -> NDArray[np.int64]:
    """Numbers of the groups that teach something: whose rewards are not all the same."""
    return np.flatnonzero(teaching(experience.reward, experience.group))


def _only(drawn: Drawn, groups: NDArray[np.int64]) -> Drawn:
    """These groups, counted from 0."""
    chosen = np.flatnonzero(np.isin(drawn.experience.group, groups))
    return replace(drawn, experience=drawn.experience.only(chosen), rows=drawn.rows[chosen])


def together(parts: list[Drawn]) -> Drawn:
    """What was drawn in several parts, group after group; seconds and failures are added up."""
    names = parts[0].seconds.keys()
    return Drawn(
        experience=joined([part.experience for part in parts if len(part.rows)]),
        rows=np.concatenate([part.rows for part in parts]),
        seconds={name: sum(part.seconds[name] for part in parts) for name in names},
        failures={name: sum(part.failures[name] for part in parts) for name in names},
    )
