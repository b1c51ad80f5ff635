"""The trainer: one loop for every stage; knows torch and DeepSpeed, knows no Kubernetes."""

import logging

# peft imports bitsandbytes, which on some CPUs asks in every log for a package that would fetch kernels from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
