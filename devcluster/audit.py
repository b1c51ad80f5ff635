"""The API server's audit log: who wrote what, in which order, and what became of it.

Switched on by `ClusterSpec.audit`, for tests that must know what did *not* happen twice. Writes only, without bodies;
one JSON object a line, in the order in which the server answered. Used by controlplane and by the tests.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WRITES = ("create", "update", "patch", "delete", "deletecollection")
GROUPS = ("posttrain.dev", "kubeflow.org", "trainer.kubeflow.org", "coordination.k8s.io")
CORE = ("pods", "configmaps", "persistentvolumeclaims")
WHAT: list[dict[str, Any]] = [*({"group": group} for group in GROUPS), {"group": "", "resources": list(CORE)}]
POLICY: dict[str, Any] = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted", "Panic"],
    "rules": [{"level": "Metadata", "verbs": list(WRITES), "resources": WHAT}, {"level": "None"}],
}


def log_path(root: Path) -> Path:
    """Where the log of the cluster in this folder is."""
    return root / "logs" / "audit.log"


def flags(root: Path) -> list[str]:
    """The API server's flags; writes the policy beside them."""
    policy = root / "audit-policy.json"
    policy.write_text(json.dumps(POLICY))
    # Blocking: an answer that a client has is in the log.
    return [f"--audit-policy-file={policy}", f"--audit-log-path={log_path(root)}", "--audit-log-mode=blocking"]


def entries(root: Path) -> Iterator[dict[str, Any]]:
    """Every entry so far (audit.k8s.io/v1 Event). The last line may be half written."""
    for line in log_path(root).read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
