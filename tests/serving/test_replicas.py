"""scripts/serve_replicas.py: two processes behind one address, and one of them lost. Needs the extra `replicas`."""

import pytest

import mimo_jax as mimo
from tests.serving.loopback import seen_by, skip_where_namespaces_are_not_allowed

pytest.importorskip("ray.serve")


@pytest.fixture(scope="module")
def seen():
    skip_where_namespaces_are_not_allowed()
    return seen_by("two_replicas.py", "8123")


def test_replicas_answer_as_one_process_does(seen):
    """The same routes, texts and errors, whichever replica has the request."""
    assert seen["first_line"] == "mimo-tiny listens on http://127.0.0.1:8123, replicas: 2\n"
    assert seen["replicas"] == 2
    assert seen["wrong_key"] == "invalid_api_key"
    assert seen["texts"] == [mimo.generate(mimo.load(), seen["prompt"], mimo.Greedy(), max_tokens=24).text]


def test_an_account_stays_with_its_replica(seen):
    """So that it finds the prefixes that it has left there: only the first of its requests reads the prompt."""
    for first, *later in seen["cached"]:
        assert first == 0 and min(later) > 0


def test_a_lost_replica_is_replaced(seen):
    """And whom it served is served by the other one meanwhile."""
    assert seen["texts_after_a_loss"] == seen["texts"]
    assert seen["replicas_after_a_loss"] == 2


def test_what_is_under_way_is_finished_at_the_end(seen):
    """SIGTERM cuts no stream, and leaves no process."""
    assert seen["pieces"] > 1 and seen["streamed_to_the_end"]
    assert (seen["exit_code"], seen["left"]) == (0, 0)
