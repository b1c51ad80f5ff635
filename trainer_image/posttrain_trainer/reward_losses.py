"""Losses of a reward model: two scores per pair of answers. torch only; called by `algorithms/reward_model`.

Pure functions of scores per pair, fp32 [r] → [r]; the loop divides once by the number of pairs of the whole step.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """−log σ(r_c − r_r − m): the chosen answer's score is above the rejected one's, by m [r] at least where one was
    annotated.

    Ouyang et al. 2022 (arXiv:2203.02155), equation 1; the margin: Touvron et al. 2023 (arXiv:2307.09288), equation 2.
    """
    return -logsigmoid(chosen - rejected - margin)


def centering(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_c + r_r)²: scores stay around zero, which differences alone leave open.

    Eisenstein et al. 2023 (arXiv:2312.09244), equation 2.
    """
    return (chosen + rejected) ** 2
