"""`python -m elas.launch.guard`."""

import sys

from elas.launch.guard.guard import main

sys.exit(main(sys.argv[1:]))
