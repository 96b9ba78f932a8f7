"""`python -m oversight_rl` is the `oversight-rl` command."""

from oversight_rl.cli import main

main()
