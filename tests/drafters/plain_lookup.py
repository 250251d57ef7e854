"""Prompt lookup in plain Python, for tests to compare with."""


def look_up(text: list[int], longest: int, count: int = 7) -> tuple[list[int] | None, int]:
    """What followed the latest place with the longest common suffix, copied on and on; and how long that suffix was."""
    best, source = 0, None
    for place in range(len(text) - 1):
        size = 0
        while size < longest and size <= place and text[place - size] == text[len(text) - 1 - size]:
            size += 1
        if size and size >= best:
            best, source = size, place
    if source is None:
        return None, 0
    copied = list(text)
    for step in range(count):
        copied.append(copied[source + 1 + step])
    return copied[-count:], best
