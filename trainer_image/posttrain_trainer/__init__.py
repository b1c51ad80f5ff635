"""The trainer: one loop for every stage; knows torch and DeepSpeed, knows no Kubernetes."""
