"""Operations of the sparse FFN, imported as `elas.kernels`; each operation has a folder.

- `elas.kernels.relu2_24`: squared ReLU with 2:4 pruning, alone (`relu2_24`) and between two products (`ffn_core`).

A folder has `reference.py`, readable PyTorch that defines the result; other implementations, which are tested against
it; and `registry.py`, which chooses among them by name or by what runs on the machine.

Errors name the arguments of these functions. `elas.model.kernel` translates them to configuration keys.
"""
