"""What every number of a config must fit: devices compute in float32 and count in int32."""

FLOAT32_TINY, INT32_END = 1.2e-38, 2**31


def fits_devices(value: object) -> bool:
    """Whether a value is a positive number that float32 and int32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and FLOAT32_TINY <= value < INT32_END
