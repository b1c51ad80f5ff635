"""`make demo`: the whole way of a job on this machine, from an empty cluster to a measured model."""
