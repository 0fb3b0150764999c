"""``python -m dslc``."""

from dslc.cli import main

main()
