"""The configuration of a run: its schema, its files, its flags."""
