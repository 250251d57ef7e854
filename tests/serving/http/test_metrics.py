"""What dashboards read, parsed by Prometheus' own client, and held against what was observed."""

import math
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mimo_jax.errors import UserError
from mimo_jax.generation import Acceptance
from mimo_jax.serving.http.metrics import Metrics
from mimo_jax.serving.requests import Stats, Usage

STATS = Stats(
    slots=4,
    running=3,
    waiting=7,
    waiting_tokens=70,
    cache_bytes=250,
    cache_limit=1000,
    idle_seconds=0.01,
    is_alive=True,
    prompt_tokens=1000,
    cached_tokens=600,
    generated_tokens=300,
    rounds=100,
    drafted_tokens=700,
    accepted_tokens=(90, 60, 50),
    finished={"stop": 5, "length": 2},
)
# Of vLLM's dashboards: without what a parser takes off a counter's name.
NAMES = {
    "gauge": {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"},
    "counter": {
        *("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "prompt_tokens_cached", "generation_tokens"),
        *("request_success", "admission_rejections", "spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
        *("spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos"),
    },
    "histogram": {
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_prompt_tokens", "request_generation_tokens"),
    },
}


def usage(prompt=100, cached=60, generated=5, queue=0.5, prefill=1.5, decode=4.0) -> Usage:
    return Usage(prompt, cached, generated, queue, prefill, decode, Acceptance(0, 0, [], []))


def families(text: str) -> dict:
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(text: str) -> dict:
    """By name and the labels beside the model's."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            key = (sample.name, *labels.values())
            assert key not in found
            found[key] = sample.value
    return found


def check(text: str) -> None:
    """The rules of the format that the parser does not enforce."""
    assert text.endswith("\n") and "\n\n" not in text
    typed, kind = set(), ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in typed and name.endswith("_total") == (kind == "counter")
            typed.add(name)
        elif not line.startswith("#"):
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            assert line.partition("{")[0] in [name + suffix for suffix in suffixes]
    for family in text_string_to_metric_families(text):
        assert family.documentation
        if family.type == "histogram":
            buckets = [sample for sample in family.samples if sample.name.endswith("_bucket")]
            bounds = [float(sample.labels["le"]) for sample in buckets]
            counts = [sample.value for sample in buckets]
            (total,) = (sample.value for sample in family.samples if sample.name.endswith("_count"))
            assert bounds == sorted(set(bounds)) and bounds[-1] == math.inf
            assert counts == sorted(counts) and counts[-1] == total


@pytest.mark.parametrize("prefix", ["mimo:", "vllm:"])
def test_dashboards_find_their_names(prefix):
    """All of them, each of its type and with the model's name, from the first scrape on."""
    text = Metrics("mimo", prefix).render(STATS)
    check(text)
    found = families(text)
    for kind, names in NAMES.items():
        for name in names:
            assert found[prefix + name].type == kind
    assert len(found) == sum(map(len, NAMES.values()))
    assert all(sample.labels["model_name"] == "mimo" for family in found.values() for sample in family.samples)


def test_the_engine_is_read_at_each_scrape():
    found = values(Metrics("m", "").render(STATS))
    expected = {
        ("num_requests_running",): 3,
        ("num_requests_waiting",): 7,
        ("kv_cache_usage_perc",): 0.25,
        ("prefix_cache_queries_total",): 1000,
        ("prefix_cache_hits_total",): 600,
        ("prompt_tokens_total",): 1000,
        ("prompt_tokens_cached_total",): 600,
        ("generation_tokens_total",): 300,
        ("request_success_total", "stop"): 5,
        ("request_success_total", "length"): 2,
        ("spec_decode_num_drafts_total",): 100,
        ("spec_decode_num_draft_tokens_total",): 700,
        ("spec_decode_num_accepted_tokens_total",): 200,
        ("spec_decode_num_accepted_tokens_per_pos_total", "0"): 90,
        ("spec_decode_num_accepted_tokens_per_pos_total", "1"): 60,
        ("spec_decode_num_accepted_tokens_per_pos_total", "2"): 50,
    }
    assert {key: value for key, value in found.items() if key in expected} == expected


def test_histograms_hold_what_was_observed():
    """Sums, counts and buckets; a bound belongs to its own bucket."""
    metrics = Metrics("m", "")
    metrics.observe(usage(), [(10.0, 1), (10.002, 4), (10.0024, 4), (13.0, 1)])
    metrics.observe(usage(prompt=10**7, queue=0.0, prefill=1e-4, decode=1e5))
    text = metrics.render(STATS)
    check(text)
    found = values(text)
    sums = {
        "time_to_first_token_seconds": 2.0001,
        "e2e_request_latency_seconds": 6 + 1e5 + 1e-4,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.5001,
        "request_decode_time_seconds": 1e5 + 4,
        "request_prompt_tokens": 10**7 + 100,
        "request_generation_tokens": 10,
    }
    for name, total in sums.items():
        assert found[name + "_sum",] == pytest.approx(total), name
        assert found[name + "_count",] == 2
    bucket = lambda name, bound: found[f"{name}_bucket", bound]  # noqa: E731
    assert [bucket("request_queue_time_seconds", bound) for bound in ("0.25", "0.5", "+Inf")] == [1, 2, 2]
    assert [bucket("request_prompt_tokens", bound) for bound in ("50.0", "100.0", "1000000.0", "+Inf")] == [0, 1, 1, 2]
    # Four tokens after 2 ms, four after 0.4 ms, one after 2.6 s.
    assert found["inter_token_latency_seconds_count",] == 9
    assert found["inter_token_latency_seconds_sum",] == pytest.approx(3)
    gaps = [bucket("inter_token_latency_seconds", bound) for bound in ("0.0001", "0.00025", "0.001", "1.0", "+Inf")]
    assert gaps[1:] == [4, 8, 8, 9]


def test_what_never_began_has_no_first_token():
    """A request that was cancelled in the queue does not make the first token look slow."""
    metrics = Metrics("m", "")
    metrics.observe(usage(generated=0, queue=60.0, prefill=0.0, decode=0.0))
    found = values(metrics.render(STATS))
    assert found["time_to_first_token_seconds_count",] == found["request_prefill_time_seconds_count",] == 0
    assert found["request_queue_time_seconds_sum",] == found["e2e_request_latency_seconds_sum",] == 60


def test_rejections_and_accounts():
    """By reason; tokens by account only where there are accounts, a prompt once for all samples of a request."""
    metrics = Metrics("m", "")
    metrics.reject("full")
    metrics.reject("full")
    metrics.usage("", usage())
    found = values(metrics.render(STATS))
    assert found["admission_rejections_total", "full"] == 2
    assert not any(name == "account_tokens_total" for name, *_ in found)
    metrics.usage("ann", usage(), usage(cached=100))
    metrics.usage("ann", usage(prompt=1, cached=0))
    text = metrics.render(STATS)
    check(text)
    counts = {kind: values(text)["account_tokens_total", "ann", kind] for kind in ("prompt", "cached", "generated")}
    assert counts == {"prompt": 101, "cached": 60, "generated": 15}


@pytest.mark.parametrize("name", ['a"b', "a\\", "a\nb", 'x"} 1\n# TYPE', "模型", ""])
def test_labels_stay_labels(name):
    """Names of models and accounts come from outside."""
    metrics = Metrics(name)
    metrics.usage("account" + name, usage())
    text = metrics.render(STATS)
    check(text)
    samples = families(text)["mimo:account_tokens"].samples
    assert {(sample.labels["model_name"], sample.labels["account"]) for sample in samples} == {(name, "account" + name)}


@pytest.mark.parametrize("prefix", ["1:", "a b", "a-", 'a{b="', "ü"])
def test_a_prefix_is_part_of_a_name(prefix):
    with pytest.raises(UserError, match="prefix"):
        Metrics("m", prefix)


def test_no_observation_is_lost_between_threads():
    """Eight threads at once, while another one reads."""
    metrics = Metrics("m", "")

    def work():
        for number in range(200):
            metrics.observe(usage(), [(0.0, 1), (1.0, 2)])
            metrics.reject(str(number))
            metrics.usage(str(number), usage())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        check(metrics.render(STATS))
    found = values(metrics.render(STATS))
    assert found["e2e_request_latency_seconds_count",] == 1600
    assert found["inter_token_latency_seconds_count",] == 3200
    assert found["admission_rejections_total", "7"] == 8
    assert found["account_tokens_total", "7", "generated"] == 40
