"""Settings and wrappers for the deepspeed launcher: a hostfile, variables, and ssh options."""
