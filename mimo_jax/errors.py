"""The one exception that scripts turn into a single line and exit code 2, and what numbers may be."""

LARGEST = 10**9  # of a count: devices count in int32, where the sum of two must fit
MOST_REASON = 200  # characters of another library's message, which may quote what it met


class UserError(ValueError):
    """Bad input: says what was found, where, what was expected, and what to do."""


def one_line(error: object) -> str:
    """What another library has to say, as the reason within an error of ours."""
    return " ".join(str(error).split())[:MOST_REASON]


def check_whole(where: str, lowest: int, highest: int = LARGEST, **values: object) -> None:
    """Raises, naming it, unless every value is a whole number in `lowest`..`highest`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise UserError(f"{where}: {name}={value!r} must be a whole number in {lowest}..{highest}")


def check_real(where: str, lowest: float, highest: float, **values: object) -> None:
    """Raises, naming it, unless every value is a number in `lowest`..`highest`; NaN lies nowhere."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
            raise UserError(f"{where}: {name}={value!r} must be a number in {lowest:g}..{highest:g}")
