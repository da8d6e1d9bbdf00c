"""`elas doctor`: what this machine has and lacks for ELAS, as findings with a one-line fix each.

For environments that may be broken: this process imports the standard library and parts of `elas` without further
imports. Packages are imported in child processes, which may raise, crash or hang without ending the command.

- finding.py: `Finding`; the table and the fixes that people read.
- worker.py: the child process, which imports packages and queries torch; ask.py: runs two of them under a deadline.
- software.py, gpu.py, host.py: findings from the answers, and from what the machine shows without any import.
- cli.py: the command.
"""
