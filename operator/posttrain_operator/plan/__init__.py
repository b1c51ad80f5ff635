"""From a parsed job to a Plan: defaults, world size, mounts, environment. Pure; knows neither kopf nor the Kubernetes
client."""
