"""The model: low-rank linears, the 2:4 FFN, and their provision to Megatron-core."""

from elas import host

host.prepare()  # before anything imports megatron.core
