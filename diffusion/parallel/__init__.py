"""Processes: launchers, sharding, signals, compilation."""
