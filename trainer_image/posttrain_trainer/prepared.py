"""The manifest that `prepare` leaves on storage for `train`, beside the token sets.

`prepare` (one process, before any rank starts) writes them, every rank reads them, and nothing else passes between the
two. The manifest is written last: a folder without it was never finished.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from posttrain_api.base import Model
from posttrain_api.records import DataReport, Resolved
from posttrain_trainer.checkpoint_files import replace_json

MANIFEST = "manifest.json"


class PreparedAdapter(Model):
    """An adapter of an earlier job. `digest`: over its configuration and its weights."""

    dir: str
    digest: str
    revision: str | None = None


class PreparedModel(Model):
    """A model that the job asks beside the one it trains. `digest`: as `model_digest`; adapters oldest first."""

    dir: str
    digest: str
    adapters: tuple[PreparedAdapter, ...] = ()
    revision: str | None = None


class Prepared(Model):
    """The manifest. Folders are absolute paths; `config_digest` is that of the TrainerConfig it was made for."""

    config_digest: str
    model_dir: str
    """Folder with config.json and weights; for a scratch model config.json only: weights come from the seed."""
    model_digest: str
    """Over names and contents of config and weight files: a checkpoint of another model is refused by it."""
    adapters: tuple[PreparedAdapter, ...] = ()
    """Of `model.adapters`, oldest first."""
    reference_dir: str | None = None
    """Folder of the reference's config and weights; None: the reference is the starting policy."""
    reference_digest: str | None = None
    """As `model_digest`, of the reference."""
    reference_adapters: tuple[PreparedAdapter, ...] = ()
    """Of `reference.adapters`, oldest first."""
    critic_dir: str | None = None
    """Folder of PPO's critic: `critic.source`, or the reward model that it begins as; None: it begins as the policy."""
    critic_digest: str | None = None
    """As `model_digest`, of the critic."""
    critic_adapters: tuple[PreparedAdapter, ...] = ()
    """Of the critic, oldest first."""
    reward_models: dict[str, PreparedModel] = Field(default_factory=dict)
    """By the reward's name, of rewards that are models."""
    tokenizer_dir: str
    train_dir: str
    eval_dir: str | None = None
    data_digest: str
    """Over the token sets: a checkpoint made on other data is refused by it."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a completion, of stage RL."""
    data_report: DataReport
    eval_report: DataReport | None = None
    resolved: Resolved


def write_manifest(folder: Path, prepared: Prepared) -> None:
    """Commits it, last."""
    replace_json(folder / MANIFEST, prepared.to_wire())


def read_manifest(folder: Path) -> Prepared | None:
    """The committed manifest, None where there is none yet. ValueError where it is not one of ours."""
    try:
        text = (folder / MANIFEST).read_text()
    except FileNotFoundError:
        return None
    return Prepared.model_validate_json(text)
