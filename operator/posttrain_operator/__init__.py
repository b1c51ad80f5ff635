"""The PostTrainingJob operator: kopf's watches around a pure reconcile."""
