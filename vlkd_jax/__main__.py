"""`python -m vlkd_jax` is the `vlkd` command."""

from vlkd_jax.cli import main

main()
