"""Jobs without a cluster: what `posttrain run` needs to run a plan in processes of this machine."""
