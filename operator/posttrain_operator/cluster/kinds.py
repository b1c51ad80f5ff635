"""The kinds that the operator reads or writes, with where the API server has them."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain_api import names
from posttrain_operator.backends import BACKENDS, trainjob


@dataclass(frozen=True)
class Kind:
    """One namespaced kind. `api_version` as in a manifest."""

    api_version: str
    kind: str
    plural: str

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        return self.api_version.rpartition("/")[2]


JOB = Kind(names.API_VERSION, names.KIND, names.PLURAL)
CHILDREN = tuple(Kind(each.API_VERSION, each.KIND, f"{each.KIND.lower()}s") for each in BACKENDS.values())
"""The kinds of child, one for each backend; a cluster has some of them."""
PYTORCHJOB, TRAINJOB = CHILDREN
TRAINING_RUNTIME = Kind(trainjob.API_VERSION, trainjob.RUNTIME, "trainingruntimes")
POD = Kind("v1", "Pod", "pods")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
EVENT = Kind("events.k8s.io/v1", "Event", "events")
CORE_EVENT = Kind("v1", "Event", "events")
NODE = Kind("v1", "Node", "nodes")

MANAGED_SELECTOR = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
"""What the API server itself filters children and pods by."""
WATCHED = (JOB, *CHILDREN, POD)
SELECTORS = {JOB: "", POD: MANAGED_SELECTOR} | dict.fromkeys(CHILDREN, MANAGED_SELECTOR)
