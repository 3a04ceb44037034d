"""The standard's operators to functions of domain `sdc`."""
