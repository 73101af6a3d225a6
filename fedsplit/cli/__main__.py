"""``python -m fedsplit.cli``."""

from fedsplit.cli.main import main

main()
