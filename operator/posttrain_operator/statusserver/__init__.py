"""Status server: trainers report their progress here over HTTPS, and it becomes status.progress.

Runs in every replica of the operator. It never calls the control loop and the control loop never waits for it.
Protocol and rules: docs/platform/status-server.md.
"""

from posttrain_operator.statusserver.server import StatusServer, start_status_server

__all__ = ["StatusServer", "start_status_server"]
