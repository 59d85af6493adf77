"""`python -m twinmerge.cli`."""

from . import main

main()
