"""A real Kubernetes control plane on one machine, without Docker.

Why: envtest has no controllers and a fake API server knows neither CEL nor server-side apply nor the real
training-operator. etcd, kube-apiserver, kube-controller-manager, kube-scheduler and training-operator run here as
ordinary processes in a private network namespace; only the node (the kubelet's place) is ours.

Who calls it: `python -m devcluster`, the demo, and the tests through `devcluster.testing`. It is a tool of the
repository: nothing that is installed imports it.
"""
