"""The one exception that scripts turn into a single line and exit code 2."""


class UserError(ValueError):
    """Bad input: says what was found, where, what was expected, and what to do."""
