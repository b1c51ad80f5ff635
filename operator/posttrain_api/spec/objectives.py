"""What is learned from pairs: the preference losses and the reward model's. Each block belongs to one stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_api.spec.fields import SpecModel, optional

PreferenceAlgorithm = Literal["DPO", "IPO", "Hinge", "RobustDPO", "APOZero", "APODown", "SimPO"]
MAX_COEFFICIENT = 1_000_000
ColumnName = Annotated[str, Field(min_length=1, max_length=128)]


class Preference(SpecModel):
    """Stage Preference: how strongly a pair moves the policy, and what else counts."""

    beta: float | None = optional(
        "How strongly the policy is held to the reference: the factor of the log-ratio",
        default="0.1; SimPO 2.0",
        example=0.05,
        gt=0,
        le=MAX_COEFFICIENT,
    )
    label_smoothing: float | None = optional(
        "Share of pairs whose answers are taken to be swapped, less than 0.5. DPO with it is cDPO; RobustDPO needs "
        "more than 0; refused for the other algorithms",
        default="0",
        example=0.1,
        ge=0,
        lt=1,
    )
    sft_weight: float | None = optional(
        "Weight of the SFT loss on the chosen answer, added to the preference loss",
        default="0",
        example=0.1,
        ge=0,
        le=MAX_COEFFICIENT,
    )
    gamma_beta_ratio: float | None = optional(
        "Margin that SimPO asks for between the two answers, as a share of beta (SimPO only)",
        default="0.5",
        example=0.3,
        ge=0,
        le=MAX_COEFFICIENT,
    )
    cache_reference: bool | None = optional(
        "Compute the reference's log-probabilities once and keep them on storage, instead of in every step",
        default="false",
        example=True,
    )


class RewardModel(SpecModel):
    """Stage RewardModel: what is added to the ranking loss."""

    centering: float | None = optional(
        "Weight of the squared sum of the two scores, which keeps rewards around 0",
        default="0",
        example=0.01,
        ge=0,
        le=MAX_COEFFICIENT,
    )
    margin_column: ColumnName | None = optional(
        "The data's column with a number: by how much the chosen answer's score must be higher",
        default="no margin",
        example="score_difference",
    )
