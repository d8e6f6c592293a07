"""`python -m moreward`."""

from moreward.cli import main

main()
