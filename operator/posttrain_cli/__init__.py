"""The command line: posttrain, also installed as the kubectl plugin kubectl posttrain."""
