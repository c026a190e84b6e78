"""The one exception that is meant for the person at the keyboard."""


class UsageError(ValueError):
    """Something the user can put right: its message is one line that names the thing, the value,
    and what would be right. The scripts print it to stderr and exit with code 2."""
