"""Hugging Face directories in and out: one name table, strict loading, atomic saving."""
