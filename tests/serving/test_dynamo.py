"""scripts/dynamo_worker.py: the engine behind NVIDIA Dynamo's frontend; the script says what to install."""

import asyncio

import pytest

import mimo_jax as mimo
from mimo_jax.cli.options import Parser
from mimo_jax.errors import UserError
from mimo_jax.serving.launch import add_engine_options
from tests.serving.loopback import seen_by, skip_where_namespaces_are_not_allowed

dynamo = pytest.importorskip("mimo_jax.serving.dynamo", reason="NVIDIA Dynamo is not installed")

# As a frontend sends it: every field is there, and most are null.
REQUEST = {
    "token_ids": [5, 6, 7],
    "sampling_options": {"n": None, "temperature": None, "top_k": None, "seed": None, "guided_decoding": None},
    "stop_conditions": {"max_tokens": 9, "ignore_eos": None, "min_tokens": None},
    "output_options": {"logprobs": None},
}


class Context:
    """What the frontend knows a request by."""

    def id(self) -> str:
        return "request"


def changed(group: str, **values) -> dict:
    return {**REQUEST, group: {**REQUEST[group], **values}}


@pytest.fixture(scope="module")
def seen():
    skip_where_namespaces_are_not_allowed()
    return seen_by("two_dynamo_workers.py", "8124")


def test_requests_are_ours():
    """Null is absent: the model's own sampling, stops and no limit but the context."""
    request = dynamo.token_request(REQUEST, context=64)
    assert (request.prompt, request.max_tokens, request.strategy, request.stop_ids) == ((5, 6, 7), 9, None, None)
    assert dynamo.token_request(changed("stop_conditions", max_tokens=None), context=64).max_tokens == 64
    assert dynamo.token_request(changed("stop_conditions", ignore_eos=True), context=64).stop_ids == ()
    sampled = dynamo.token_request(changed("sampling_options", temperature=0.5, top_k=3, seed=-1), context=64)
    assert (sampled.strategy, sampled.seed) == (mimo.Sampled(0.5, top_k=3), 2**32 - 1)
    penalised = dynamo.token_request(changed("sampling_options", presence_penalty=0.5, frequency_penalty=-1.0), 64)
    assert (penalised.presence_penalty, penalised.frequency_penalty) == (0.5, -1.0)
    assert dynamo.token_request(changed("sampling_options", temperature=0.0), context=64).strategy == mimo.Greedy()


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("sampling_options", {"n": 2}),
        ("sampling_options", {"guided_decoding": {"json": {}}}),
        ("sampling_options", {"repetition_penalty": 1.1}),
        ("stop_conditions", {"min_tokens": 3}),
        ("output_options", {"logprobs": 0}),
    ],
)
def test_what_is_not_had_is_refused_by_name(group, values):
    """Not answered as if it had not been asked for."""
    with pytest.raises(UserError, match=next(iter(values))):
        dynamo.token_request(changed(group, **values), context=64)


def test_a_client_that_leaves_ends_its_request():
    """The slot is free for others; the engine does not go on to the limit."""

    parser = Parser()
    add_engine_options(parser)

    async def left_early() -> tuple[list[dict], int]:
        engine = dynamo.DynamoEngine(parser.parse_args(["--slots", "1"]))
        await engine.start(1)
        chunks = []
        try:
            request = changed("stop_conditions", max_tokens=1000, ignore_eos=True)
            async for chunk in engine.generate(request, Context()):
                chunks.append(chunk)
                await engine.abort(Context())
        finally:
            await engine.cleanup()
        return chunks

    *_, last = chunks = asyncio.run(left_early())
    assert last["finish_reason"] == "cancelled"
    assert sum(len(chunk["token_ids"]) for chunk in chunks) < 1000


def test_two_workers_answer_as_generate_does(seen):
    """Completions, streams and chat; errors that name what is wrong."""
    assert seen["model"] == "mimo-tiny"
    assert seen["text"] == mimo.generate(mimo.load(), seen["prompt"], mimo.Greedy(), max_tokens=24).text
    assert seen["tokens"] == 24 and seen["pieces"] > 1 and seen["chat"]
    assert seen["refusals"] == [
        "prompt: 1201 tokens; a row holds 1024, one of them generated",
        "n: not served by this worker",
    ]


def test_a_worker_that_is_ended_leaves_its_work_to_the_other(seen):
    assert seen["exit_code"] == 0
    assert seen["text_of_the_other"] == seen["text"]
