"""Configs of runs and of evaluation suites, by name; installed as `vlkd_jax.configs`."""
