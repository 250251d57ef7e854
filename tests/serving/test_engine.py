"""The engine: whatever arrives, leaves or fails beside it, a row's text is `generate`'s, token for token."""

import itertools
import json
import queue
import random
import threading
import time

import jax
import numpy as np
import pytest

import mimo_jax as mimo
from mimo_jax.errors import UserError
from mimo_jax.generation import Request, generate, generate_batch
from mimo_jax.loading import Model
from mimo_jax.serving.accounts import AccountLimit, AccountRules
from mimo_jax.serving.engine import Engine, Limits
from mimo_jax.serving.grammar import Grammars
from mimo_jax.serving.requests import Busy, TokenRequest, TooLong, Update
from tests.tiny import TINY, random_params

PATIENCE = 240.0  # seconds, on a machine that does other things, too
BEGINNINGS = (
    "def fib(n):",
    "class Stack:\n    def push(self, item):",
    "import os\n\ndef walk(path):",
    "for i in range(10):",
    '"""Reads a file."""\n',
    "try:\n    x = int(s)\nexcept",
    "@property\ndef name(self):",
    "with open(path) as f:",
)
STRATEGIES = (None, mimo.Greedy(), mimo.Greedy(), mimo.Sampled(0.8), mimo.Sampled(0.7, top_k=20, min_p=0.01))


class Sink:
    """Collects what one request is told."""

    def __init__(self) -> None:
        self.updates = queue.Queue[Update]()
        self.tokens: dict[int, list[int]] = {}
        self.last: dict[int, Update] = {}

    def __call__(self, update: Update) -> None:
        self.updates.put(update)

    def wait(self, samples: int = 1) -> "Sink":
        while len(self.last) < samples:
            update = self.updates.get(timeout=PATIENCE)
            assert update.sample not in self.last, "an update after the last one"
            self.tokens.setdefault(update.sample, []).extend(update.tokens)
            if update.finish:
                self.last[update.sample] = update
        return self


@pytest.fixture(scope="module")
def bundled():
    return mimo.load(draft="none")


@pytest.fixture(scope="module")
def engine(bundled):
    with Engine(bundled, Limits(slots=4)) as engine:
        yield engine


def ask(engine: Engine, prompt, *arguments, **fields) -> Sink:
    sink = Sink()
    engine.submit(TokenRequest(tuple(prompt), *arguments, **fields), sink)
    return sink.wait(fields.get("samples", 1))


def test_first_tokens_are_told_at_once(engine):
    """By themselves, before anything else is decoded."""
    sink = Sink()
    engine.submit(TokenRequest((5, 6), 20, samples=3), sink)
    first = [sink.updates.get(timeout=PATIENCE) for _ in range(3)]
    assert [(update.sample, len(update.tokens)) for update in first] == [(0, 1), (1, 1), (2, 1)]
    sink.wait(3)


def test_rounds_that_get_slower_are_noticed(bundled):
    """By texts that all end within a visit, too: the next ones come in small pieces again."""

    class Clock:
        now, step = 0.0, 1e-5

        def __call__(self) -> float:
            self.now += self.step
            return self.now

    def pieces(engine: Engine) -> int:
        sink, told = Sink(), []
        engine.submit(TokenRequest((5, 6), 40, stop_ids=()), lambda update: (told.append(update), sink(update)))
        sink.wait()
        return len(told)

    clock = Clock()
    with Engine(bundled, Limits(slots=1), clock=clock) as engine:
        pieces(engine)
        assert pieces(engine) == 2
        clock.step = 1.0
        assert pieces(engine) == 2
        assert pieces(engine) > 10


@pytest.mark.parametrize(("draft", "count"), [("none", 200), ("dflash", 200), ("lookup", 60)])
def test_texts_are_those_of_generate(draft, count):
    """Requests in any order, long and short, greedy and sampled; one in eight is cancelled on its way."""
    model, rng = mimo.load(draft=draft), random.Random(draft == "dflash")
    requests = []
    for seed in range(count):
        prompt = model.tokenizer.encode(rng.choice(BEGINNINGS) * rng.choice((1, 1, 2, 12)))[:150]
        limit = rng.choice((1, 2, 24, 60))
        requests.append(TokenRequest(tuple(prompt), limit, rng.choice(STRATEGIES), seed))
    sinks = [Sink() for _ in requests]
    with Engine(model, Limits(slots=3, cache_bytes=20_000_000)) as engine:
        for number, (request, sink) in enumerate(zip(requests, sinks)):
            ticket = engine.submit(request, sink)
            if number % 8 == 0:
                threading.Timer(rng.random() * 0.1, engine.cancel, [ticket]).start()
            time.sleep(rng.choice((0, 0, 0.01)))
        for sink in sinks:
            sink.wait()
    alone = [Request(one.prompt, one.strategy, one.max_tokens, one.seed) for one in requests]
    for request, sink, expected in zip(requests, sinks, generate_batch(model, alone)):
        update, tokens = sink.last[0], sink.tokens[0]
        if update.finish == "cancelled":
            assert tokens == expected.tokens[: len(tokens)]
        else:
            assert (tokens, update.finish) == (expected.tokens, expected.finish_reason), request
            assert update.usage.generated_tokens == len(tokens)


def test_what_a_text_takes_is_told_all_along():
    """Every update has its tokens and rounds up to now; at the end they are those of `generate`."""
    model, told, sink = mimo.load(draft="dflash"), [], Sink()
    request = TokenRequest((5, 6), 300, mimo.Greedy(), stop_ids=())
    with Engine(model, Limits(slots=2)) as engine:
        engine.submit(request, lambda update: (told.append(update), sink(update)))
        sink.wait()
    counts = np.cumsum([len(update.tokens) for update in told])
    rounds = [update.usage.acceptance.rounds for update in told]
    assert [update.usage.generated_tokens for update in told] == counts.tolist() and len(told) > 2
    assert rounds[0] == 0 and rounds == sorted(rounds)
    assert all(update.usage.acceptance.tokens == count - 1 for update, count in zip(told, counts))
    last = told[-1].usage.acceptance  # the limit may cut what the last round accepted
    assert last.rounds < last.tokens <= last.rounds + sum(last.accepted)


def test_a_model_of_modules_is_served_alike(bundled):
    """The engine knows no step: the modules under XLA give `generate`'s texts, too."""
    model = Model(TINY, random_params(TINY), bundled.tokenizer)
    with Engine(model, Limits(slots=2)) as engine:
        for seed, length in enumerate((3, 200, 20)):
            prompt = np.random.default_rng(seed).integers(0, TINY.vocab_size, length).tolist()
            for strategy in (mimo.Greedy(), mimo.Sampled(0.9)):
                expected = generate(model, prompt, strategy, max_tokens=20, seed=seed).tokens
                assert ask(engine, prompt, 20, strategy, seed).tokens[0] == expected


def test_samples_share_one_prompt(engine, bundled):
    """Sample i is what `generate` draws with seed + i; more of them than there are slots take turns."""
    prompt, strategy = bundled.tokenizer.encode("def binary_search(items, target):"), mimo.Sampled(0.9)
    before = engine.stats().prompt_tokens
    sink = ask(engine, prompt, 16, strategy, seed=7, samples=6)
    assert engine.stats().prompt_tokens - before == len(prompt)
    for sample in range(6):
        assert sink.tokens[sample] == generate(bundled, prompt, strategy, max_tokens=16, seed=7 + sample).tokens


def test_one_sample_can_be_cancelled(engine, bundled):
    """The others go on."""
    prompt, sink = tuple(bundled.tokenizer.encode("class Node:")), Sink()
    ticket = engine.submit(TokenRequest(prompt, 400, mimo.Sampled(0.9), 1, samples=2), sink)
    for sample in (1, 2, -1):  # the last two are none of its
        engine.cancel(ticket, sample)
    sink.wait(2)
    assert sink.last[1].finish == "cancelled"
    assert sink.tokens[0] == generate(bundled, prompt, mimo.Sampled(0.9), max_tokens=400, seed=1).tokens


def test_a_row_ends_at_its_own_stops(engine, bundled):
    """Stop ids of a request replace the model's."""
    prompt = bundled.tokenizer.encode("def add(a, b):")
    tokens = ask(engine, prompt, 30, mimo.Greedy(), stop_ids=()).tokens[0]
    place = next(place for place in range(5, 30) if tokens[place] not in tokens[:place])
    sink = ask(engine, prompt, 30, mimo.Greedy(), stop_ids=(tokens[place],))
    assert (sink.tokens[0], sink.last[0].finish) == (tokens[: place + 1], "stop")


@pytest.mark.parametrize("draft", ["none", "dflash"])
def test_a_hit_equals_a_cold_run(draft):
    """What was kept of a prefix changes no bit, of tokens and of logarithms, and reads only what is new."""
    model, rng = mimo.load(draft=draft), np.random.default_rng(5)
    shared, *ends = (rng.integers(6, 4000, size).tolist() for size in (300, 40, 90, 5))
    asked = [shared + end for end in ends]
    options = {"max_tokens": 40, "strategy": mimo.Sampled(0.9), "seed": 3, "top_logprobs": 2, "stop_ids": ()}

    def run(engine: Engine, prompt) -> tuple:
        sink = Sink()
        engine.submit(TokenRequest(tuple(prompt), **options), sink)
        logprobs = []
        while not sink.last:
            update = sink.updates.get(timeout=PATIENCE)
            sink.tokens.setdefault(0, []).extend(update.tokens)
            logprobs += update.logprobs
            if update.finish:
                sink.last[0] = update
        return sink.tokens[0], logprobs, sink.last[0].usage.cached_tokens

    with Engine(model, Limits(slots=2)) as engine:
        warm = [run(engine, prompt) for prompt in asked]
        second, other = asked[0] + warm[0][0] + [17, 18], asked[0] + [19] * 60
        warm += [run(engine, prompt) for prompt in (asked[0], second, other)]
    chunk = model.decoder.step.prefill_buckets[-1]
    assert [cached for *_, cached in warm] == [
        0,
        256,  # where the first prompt's last chunk ended, which is in what they share
        256,
        256,
        len(asked[0]) + 40 - 1,  # all of the turn before but its last token, which nobody has read yet
        len(asked[0]),  # where an answer began that comes back in other tokens
    ]
    assert chunk == 128
    with Engine(model, Limits(slots=2, cache_bytes=0)) as engine:
        cold = [run(engine, prompt) for prompt in (*asked, asked[0], second, other)]
    assert [found[:2] for found in warm] == [found[:2] for found in cold]
    assert {cached for *_, cached in cold} == {0}


def test_accounts_do_not_share_prefixes(engine, bundled):
    """How fast an answer comes tells nobody what another has asked."""
    prompt = np.random.default_rng(8).integers(6, 4000, 300).tolist()
    cached = [
        ask(engine, prompt, 2, mimo.Greedy(), account=account).last[0].usage.cached_tokens
        for account in ("a", "a", "b")
    ]
    assert cached == [0, 256, 0]


def test_the_cache_keeps_to_its_limit(bundled):
    """Bytes are counted, and the longest unused goes first."""
    with Engine(bundled, Limits(slots=1, cache_bytes=4_000_000)) as engine:
        for seed in range(12):
            ask(engine, np.random.default_rng(seed).integers(6, 4000, 300).tolist(), 2, mimo.Greedy())
            assert engine.stats().cache_bytes <= 4_000_000
        assert engine.stats().cache_bytes > 1_000_000


def test_logarithms_are_the_models_own(engine, bundled):
    """Before temperature, filters, bias and penalties; the most likely first, and of every token its own."""
    prompt = bundled.tokenizer.encode("import numpy as np\n")
    options = {"presence_penalty": 1.0, "logit_bias": {300: 5.0}, "top_logprobs": 3}
    sink = Sink()
    engine.submit(TokenRequest(tuple(prompt), 12, mimo.Sampled(0.5, top_p=0.5), 3, **options), sink)
    found, tokens = [], []
    while not (found and update.finish):
        update = sink.updates.get(timeout=PATIENCE)
        found += update.logprobs
        tokens += update.tokens
    step, whole = bundled.decoder.step, np.array([prompt + tokens[:-1]], np.int32)
    logits, *_ = step(bundled.weights.target, whole, step.init_cache(1, 256), np.array([whole.shape[1]], np.int32))
    logs = jax.nn.log_softmax(np.asarray(logits)[0, len(prompt) - 1 :])
    assert len(found) == len(tokens) == 12
    for token, row, logarithm in zip(tokens, np.asarray(logs), found):
        best = np.argsort(-row)[:3]
        assert logarithm.token == token
        assert logarithm.logprob == pytest.approx(row[token], abs=1e-4)
        assert [value for _, value in logarithm.top] == pytest.approx(row[best].tolist(), abs=1e-4)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}


def test_structured_texts_follow_their_grammar():
    """Whatever the model would rather write; drafted or not. Texts beside them are `generate`'s."""
    greedy = []
    for draft in ("none", "dflash"):
        model, sinks = mimo.load(draft=draft), [Sink() for _ in range(5)]
        grammar = Grammars(model.tokenizer, model.config.vocab_size, model.stop_ids).json_schema(SCHEMA)
        prompt, sampled = tuple(model.tokenizer.encode("import json\n\nDATA = ")), mimo.Sampled(0.9)
        with Engine(model, Limits(slots=3)) as engine:
            engine.submit(TokenRequest(prompt, 100, sampled, 5), sinks[0])
            for seed, sink in enumerate(sinks[1:]):
                strategy = sampled if seed else mimo.Greedy()
                engine.submit(TokenRequest(prompt, 100, strategy, seed, matcher=grammar.matcher), sink)
            free, *structured = (sink.wait().tokens[0] for sink in sinks)
        assert free == generate(model, prompt, sampled, max_tokens=100, seed=5).tokens
        for tokens, sink in zip(structured, sinks[1:]):
            found = json.loads(model.tokenizer.decode(tokens))
            assert sink.last[0].finish == "stop" and set(found) == {"name", "age", "ok"}
            assert found["name"] in ("ada", "bob") and type(found["age"]) is int and type(found["ok"]) is bool
        greedy.append(structured[0])
    assert greedy[0] == greedy[1]


def test_a_matcher_that_fails_ends_its_own_text(engine, bundled):
    """With "error"; the engine lives."""

    class Broken:
        def masks(self, drafts, out):
            raise RuntimeError("broken")

        def commit(self, tokens):
            pass

    prompt = bundled.tokenizer.encode("def h():")
    assert ask(engine, prompt, 50, matcher=Broken).last[0].finish == "error"
    assert ask(engine, prompt, 5, mimo.Greedy()).last[0].finish == "length"


def test_late_requests_end_with_what_there_is(engine, bundled):
    """At a deadline: the text so far, which is nothing for one that still waits."""
    now, prompt, first, second = [0.0], tuple(bundled.tokenizer.encode("def f(x):")), Sink(), Sink()
    with Engine(bundled, Limits(slots=1), clock=lambda: now[0]) as late:
        late.submit(TokenRequest(prompt, 900, mimo.Greedy(), stop_ids=(), seconds=5), first)
        begin = first.updates.get(timeout=PATIENCE).tokens
        late.submit(TokenRequest(prompt, 900, mimo.Greedy(), seconds=4), second)
        now[0] = 6.0
        assert [sink.wait().last[0].finish for sink in (first, second)] == ["deadline"] * 2
    found, whole = [*begin, *first.tokens[0]], ask(engine, prompt, 900, mimo.Greedy(), stop_ids=()).tokens[0]
    assert second.tokens[0] == [] and 0 < len(found) < 900 and found == whole[: len(found)]


def test_a_deadline_that_cannot_be_met_is_refused(bundled):
    """Before anything is queued, from what waits and how fast prompts were read so far."""
    ticks = itertools.count()
    with Engine(bundled, Limits(slots=1), clock=lambda: float(next(ticks))) as slow:  # a second for every look at it
        ask(slow, (5,) * 600, 2, mimo.Greedy())
        with pytest.raises(Busy, match=r"reading what waits takes .* s; 0.5 s were given"):
            slow.submit(TokenRequest((5,) * 900, seconds=0.5), Sink())


def test_what_cannot_be_served_is_named(engine, bundled):
    """One line, before anything is queued."""
    room = engine.context
    for prompt, error, message in (
        ((), UserError, "prompt: empty"),
        ((1,) * room, TooLong, rf"prompt: {room} tokens; a row holds {room}"),
        ((4096,), UserError, r"prompt: token id 4096 is outside the vocabulary of 4096"),
    ):
        with pytest.raises(error, match=message):
            engine.submit(TokenRequest(prompt), Sink())
    for fields, message in (
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"presence_penalty": 3.0}, "presence_penalty=3.0"),
        ({"logit_bias": {3: 101.0}}, "3=101.0"),
        ({"top_logprobs": 21}, "top_logprobs=21"),
        ({"seconds": 0.0}, "seconds=0.0"),
    ):
        with pytest.raises(UserError, match=message):
            TokenRequest((1,), **fields)


def test_a_full_queue_refuses(bundled):
    """Requests and tokens are bounded; an account has its own limit."""
    limits = Limits(slots=1, waiting=2, waiting_tokens=50)
    with Engine(bundled, limits, AccountRules(entries=3)) as engine:
        sinks = [Sink() for _ in range(3)]
        engine.submit(TokenRequest((5,), 900, mimo.Greedy(), stop_ids=()), sinks[0])
        sinks[0].updates.get(timeout=PATIENCE)  # it runs
        with pytest.raises(Busy):
            engine.submit(TokenRequest((5,) * 60), Sink())
        for sink in sinks[1:]:
            engine.submit(TokenRequest((5,), 5, mimo.Greedy()), sink)
        with pytest.raises((Busy, AccountLimit)):
            engine.submit(TokenRequest((5,), 5), Sink())
    assert [sink.last[0].finish for sink in map(Sink.wait, sinks)] == ["cancelled"] * 3


def test_a_sink_that_fails_hurts_nobody_else(engine, bundled):
    """Its request is cancelled."""

    def fails(update: Update) -> None:
        raise OSError("gone")

    prompt = bundled.tokenizer.encode("def g():")
    engine.submit(TokenRequest(tuple(prompt), 500, mimo.Greedy()), fails)
    assert (
        ask(engine, prompt, 20, mimo.Greedy()).tokens[0]
        == generate(bundled, prompt, mimo.Greedy(), max_tokens=20).tokens
    )
    assert engine.stats().is_alive


def test_closing_lets_work_end(bundled):
    """Within its grace; what comes later is refused."""
    sink = Sink()
    engine = Engine(bundled, Limits(slots=1))
    engine.submit(TokenRequest((5, 6), 30, mimo.Greedy(), stop_ids=()), sink)
    engine.close(grace=PATIENCE)
    assert sink.wait().last[0].finish == "length"
    with pytest.raises(Busy):
        engine.submit(TokenRequest((5,)), Sink())
    assert not engine.stats().is_alive


def test_counters_return_to_zero(engine, bundled):
    """Nothing is left behind by requests of any end."""
    deadline = time.monotonic() + PATIENCE
    while (stats := engine.stats()).running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
    assert stats.is_alive and stats.idle_seconds < PATIENCE
