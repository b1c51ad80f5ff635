"""Which replica leads: an elector over one Lease, and the fence that stops the writes of one that no longer does.

`app` starts the elector at once and the control loop when it has won. Kubernetes has no fencing tokens: what the
fence cannot stop (a request that was under way) is harmless by deterministic names and preconditions.
"""
