"""`elas launch ssh`: ranks on the hosts of a hostfile, with the deepspeed launcher over pdsh.

`command` is the command; `wrapper` is run by the script `ssh` of this folder, in place of ssh, on the launching host;
`remote` runs a command on a host; `variables` selects the environment that is forwarded to it.
"""
