"""`elas launch ssh`: ranks on the hosts of a hostfile, with the deepspeed launcher over pdsh.

`command` is the command; `wrapper` is what the program `ssh` of this folder runs in place of ssh on the launching host;
`remote` starts something on a host; `variables` are the environment that is forwarded to it.
"""
