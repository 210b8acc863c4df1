"""`python -m vlkd_jax` is the `vlkd` command."""

from vlkd_jax.cli import main

if __name__ == "__main__":  # worker processes of the data pipeline import this file again
    main()
