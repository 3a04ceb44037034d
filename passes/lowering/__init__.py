"""Functions of domain `sdc` to what one backend reads best."""
