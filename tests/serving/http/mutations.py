"""Bodies that are a little wrong."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# On a machine with other work to do, and with an engine that all examples share.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.sampled_from([-1, 0, 1, 2, 0.5, -0.0, 1e300, "", "required", "text", "json_object", "\ud800"]),
    st.floats(),
    st.text(max_size=5),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5
)


def places(value, path=()):
    """Of everything in a body."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw, bodies):
    """A route, and its body with some values replaced or taken out, and perhaps a byte."""
    route, body = draw(st.sampled_from(bodies))
    body = json.loads(json.dumps(body))
    for _ in range(draw(st.integers(1, 4))):
        *path, last = draw(st.sampled_from([*places(body)]))
        holder = body
        for key in path:
            holder = holder[key]
        if draw(st.booleans()) and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = draw(VALUES)
        if not body:
            break
    data = bytearray(json.dumps(body).encode())
    if draw(st.integers(0, 4)) == 0:
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return route, bytes(data)
