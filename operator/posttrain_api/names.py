"""Names that operator, trainer, chart and command line must agree on: group, labels, mount paths, ports, environment.

Constants only. Whoever needs a string that another component also needs takes it from here.
"""

from __future__ import annotations

GROUP = "posttrain.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "PostTrainingJob"
PLURAL = "posttrainingjobs"

MANAGED_BY = "posttrain-operator"
LABEL_NAME = "app.kubernetes.io/name"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_PART_OF = "app.kubernetes.io/part-of"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_STAGE = f"{GROUP}/stage"
LABEL_METRICS = f"{GROUP}/metrics"
"""Set to "true" on the master pod only: the PodMonitor selects by it."""
ANNOTATION_SPEC_HASH = f"{GROUP}/spec-hash"

STATUS_MANAGER = "posttrain-status"
"""Field manager of everything in status but progress."""
PROGRESS_MANAGER = "posttrain-progress"
"""Field manager of status.progress, written by the status server alone."""

CONTAINER = "pytorch"
"""The training-operator insists on this container name."""
RENDEZVOUS_PORT = 23456
RENDEZVOUS_PORT_NAME = "pytorchjob-port"
METRICS_PORT = 9464
METRICS_PORT_NAME = "metrics"

# Where things are inside a trainer pod. A local run uses the same names below a folder of its own.
CONFIG_DIR = "/etc/posttrain/config"
CONFIG_FILE = "config.json"
SECRETS_DIR = "/etc/posttrain/secrets"
"""Secret `s` of a source is mounted at `<SECRETS_DIR>/s/`, one file per key."""
CONFIGMAPS_DIR = "/etc/posttrain/configmaps"
"""ConfigMap `c` of a `configmap://c/key` source is mounted at `<CONFIGMAPS_DIR>/c/`."""
STATUS_DIR = "/var/run/secrets/posttrain"
"""Projected: `token` (our audience) and `ca.crt`."""
STORAGE_DIR = "/storage"
"""The job's own claim, read-write."""
CLAIMS_DIR = "/claims"
"""Claim `c` of a `pvc://c/path` source is mounted read-only at `<CLAIMS_DIR>/c/`."""
WORK_DIR = "/work"
"""An emptyDir: HOME and every cache."""
STAGING_DIR = "staging"
"""Below the work folder: checkpoints on their way to the storage; in memory where the job wishes it."""
TERMINATION_LOG = "/dev/termination-log"

STATUS_AUDIENCE = "posttrain.dev/status"
STATUS_PATH = "/apis/posttrain.dev/v1alpha1/namespaces/{namespace}/posttrainingjobs/{name}/report"
STATUS_HEARTBEAT = "heartbeat"
"""Beside `report`: every other pod's sign of life, answered with the operator's wishes."""
STATUS_STACKS = "stacks"
"""Beside `report`: `stacks/<rank>` takes a rank's stacks as text."""
KUBEFLOW_STATUS_PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs/{name}/status"

# Environment of a trainer pod. PET_* and MASTER_* come from the training-operator (or from `posttrain run`).
ENV_CONFIG = "POSTTRAIN_CONFIG"
"""Path of the TrainerConfig JSON."""
ENV_ALLOW_CPU = "POSTTRAIN_ALLOW_CPU"
""""true": a job that asked for GPUs may run on the CPU (gloo, fp32). Without it the trainer refuses."""
ENV_POD_NAME = "POSTTRAIN_POD_NAME"
ENV_NODE_NAME = "POSTTRAIN_NODE_NAME"
ENV_NODE_RANK_OFFSET = "POSTTRAIN_NODE_RANK_OFFSET"
"""Added to PET_NODE_RANK, where the pods after the first count from 0 too (backend TrainJob)."""
ENV_TERMINATION_LOG = "POSTTRAIN_TERMINATION_LOG"
ENV_METRICS_PORT = "POSTTRAIN_METRICS_PORT"
STALL_SECONDS = 1800
"""Built-in runPolicy.stallSeconds: a job that has not got on for so long hangs."""
ENV_STALL_SECONDS = "POSTTRAIN_STALL_SECONDS"
"""runPolicy.stallSeconds when the pod was planned. Not in the TrainerConfig: it may be edited while the job runs."""
ENV_STATUS_URL = "POSTTRAIN_STATUS_URL"
"""Full URL of our own report path for this job; reports are off where it is unset."""
ENV_STATUS_CA = "POSTTRAIN_STATUS_CA_CERT"
"""Path of the CA bundle."""
ENV_STATUS_TOKEN = "POSTTRAIN_STATUS_TOKEN"
"""Path of the projected token (re-read for every report: it rotates)."""
ENV_KUBEFLOW_URL = "KUBEFLOW_TRAINER_SERVER_URL"
ENV_KUBEFLOW_CA = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
ENV_KUBEFLOW_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"

# Layout of a job's folder on its claim: `<claim>/<job name>/<uid>/…`
PREPARED_DIR = "prepared"
CHECKPOINTS_DIR = "checkpoints"
OUTPUT_DIR = "output"
BEST_DIR = "best"
METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
ATTEMPT_FILE = "attempt.json"
COMMITTED_FILE = "committed.json"
"""The newest checkpoint that was committed, where one was."""
STACKS_DIR = "stacks"
"""Of ranks that stood still: `<attempt>-rank-<rank>.txt`."""


def run_path(name: str, uid: str) -> str:
    """The job's folder, relative to its claim."""
    return f"{name}/{uid}"
