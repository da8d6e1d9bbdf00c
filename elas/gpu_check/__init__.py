"""`elas gpu-check`: what is right, what is wrong and how fast it is on this GPU, within ten minutes.

Each part is a process with a time limit, so that a crash or a hang of one does not take the others. A part appends its
rows to a file as it finds them; what it had found before a crash counts. The command and the parts that only start
others (training, speed) do not import torch.

- cli.py: the command; report.py: table, report.txt, report.json.
- rows.py: a row of the table; setting.py: what a part is given; parts.py: the parts, their order and time limits.
- runner.py: runs parts within the budget; worker.py: a part's process; processes.py: starts and ends processes.
- hardware.py, kernels.py with kernel_cases.py, training.py, nccl.py, checkout.py (the tests), speed.py: the parts.
"""
