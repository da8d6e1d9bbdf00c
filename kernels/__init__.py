"""Operations of the sparse FFN, imported as `elas.kernels`: one folder an operation.

Each folder holds `reference.py`, readable PyTorch that is the truth; `plain/compressed.py`, the autograd functions that
keep less for the backward pass; further implementations beside them; and `registry.py`, which picks one of them by name
or by what the machine has and says which.

- `elas.kernels.relu2_24`: squared ReLU with 2:4 pruning, alone (`relu2_24`) and between two products (`ffn_core`).
"""
