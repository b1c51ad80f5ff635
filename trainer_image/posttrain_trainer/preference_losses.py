"""Losses of pairs of answers: one that was chosen and one that was rejected. torch only; called by
`algorithms/preference`.

Each is a pure function of two scores per pair, fp32 [r] → [r]: no sum, no mean, no weight, because the loop divides
once by the number of pairs of the whole step. What a score is, is said once: a = log π(y|x) − log ref(y|x), summed over
the answer's counted tokens; `ipo` and `simpo` take means over them instead, and `simpo` has no reference. `beta` is how
strongly the policy is held at the reference. Everything goes through logsigmoid or sigmoid, so that a large score
neither overflows nor loses its gradient early.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """−(1−ε)·log σ(βΔ) − ε·log σ(−βΔ), Δ = a_c − a_r.

    ε = 0: Rafailov et al. 2023 (arXiv:2305.18290), equation 7. ε > 0: conservative DPO, the label is wrong with
    probability ε (Mitchell 2023, "A note on DPO with noisy preferences"), as in OpenRLHF.
    """
    logit = beta * (chosen - rejected)
    return -(1 - smoothing) * logsigmoid(logit) - smoothing * logsigmoid(-logit)


def robust_dpo(chosen: Tensor, rejected: Tensor, beta: float, smoothing: float) -> Tensor:
    """[−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1 − 2ε): DPO's expectation without bias where a share ε < ½ of the labels
    is flipped.

    Chowdhury et al. 2024 (arXiv:2403.00409). It has no lower bound for ε > 0.
    """
    logit = beta * (chosen - rejected)
    return (-(1 - smoothing) * logsigmoid(logit) + smoothing * logsigmoid(-logit)) / (1 - 2 * smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(a_c/|y_c| − a_r/|y_r| − 1/(2β))²; the arguments are the means per token.

    Azar et al. 2023 (arXiv:2310.12036), equation 17, β for its τ. The means are what its authors confirmed to TRL; the
    paper's text does not have them.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """max(0, 1 − βΔ). SLiC's loss on normalised likelihoods: Liu et al. 2023 (arXiv:2309.06657)."""
    return (1 - beta * (chosen - rejected)).relu()


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(1 − σ(βa_c)) + σ(βa_r): the chosen answer up, the rejected one down.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 7.
    """
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """σ(βa_c) + (1 − σ(β(a_c − a_r))): both answers down, the rejected one further.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 8.
    """
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma_beta_ratio: float) -> Tensor:
    """−log σ(β·(log π(y_c)/|y_c| − log π(y_r)/|y_r|) − γ), γ = β·gamma_beta_ratio; the arguments are the means per
    token, without a reference.

    Meng et al. 2024 (arXiv:2405.14734), equation 6.
    """
    return -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))
