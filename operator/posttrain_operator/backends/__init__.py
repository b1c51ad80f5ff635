"""From a Plan to the child objects that run it. Pure: no cluster, no clock; one module per backend."""
