"""Accounts on a clock of the test's own: who may enter, who waits, and in which order they are served."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.generation import Acceptance
from mimo_jax.serving.accounts import AccountLimit, AccountRules, Accounts, FairOrder, Standing, Tokens
from mimo_jax.serving.requests import Usage

MINUTE = 60.0


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def trial(sessions=1, entries=10):
    """UltraSpeed's rules, and their clock."""
    clock = Clock()
    return Accounts(AccountRules(entries=entries, sessions=sessions), clock), clock


def usage(prompt: int, cached: int, generated: int) -> Usage:
    return Usage(prompt, cached, generated, 0.0, 0.0, 0.0, Acceptance(0, 0, [], []))


def waits(accounts: Accounts, account: str) -> float:
    with pytest.raises(AccountLimit) as caught:
        accounts.enter(account)
    return caught.value.retry_after


def test_the_eleventh_entry_waits():
    """Ten per account, whatever others have; one that leaves makes room for one."""
    accounts, _ = trial(sessions=None)
    for _ in range(10):
        accounts.enter("a")
    assert waits(accounts, "a") >= 1
    accounts.enter("b")
    accounts.leave("a")
    accounts.enter("a")
    waits(accounts, "a")


def test_without_rules_everybody_enters():
    accounts = Accounts(AccountRules())
    for _ in range(1000):
        accounts.enter("")
    assert accounts.state("") == Standing("active")


def test_sessions_are_given_in_line():
    """Who waits knows its position, keeps it by asking again, and moves up as others close."""
    accounts, _ = trial()
    assert accounts.state("a") == Standing("new")
    accounts.enter("a")
    for account in ("b", "c", "b"):
        waits(accounts, account)
    assert [accounts.state(account) for account in "abc"] == [
        Standing("active"),
        Standing("waiting", 1),
        Standing("waiting", 2),
    ]
    accounts.close("a")
    assert [accounts.state(account) for account in "abc"] == [
        Standing("released", reason="closed"),
        Standing("active"),
        Standing("waiting", 1),
    ]
    waits(accounts, "a")
    assert accounts.state("a") == Standing("waiting", 2)
    accounts.close("c")
    assert accounts.state("a") == Standing("waiting", 1)


def test_a_session_ends_after_thirty_minutes_if_another_waits():
    """Not a second earlier; what runs then goes on."""
    accounts, clock = trial()
    accounts.enter("a")
    clock.now = 30 * MINUTE - 1
    assert waits(accounts, "b") == 1
    accounts.enter("a")
    clock.now += 1
    waits(accounts, "a")
    assert accounts.state("a") == Standing("waiting", 1)
    assert accounts.state("b") == Standing("active")
    accounts.leave("a", usage(10, 0, 5))
    assert accounts.usage("a") == Tokens(10, 0, 5)


def test_only_as_many_sessions_end_as_are_wanted():
    """The oldest first, and none while nobody waits."""
    accounts, clock = trial(sessions=2)
    accounts.enter("a")
    clock.now = 1
    accounts.enter("b")
    clock.now = 40 * MINUTE
    assert accounts.state("a").phase == accounts.state("b").phase == "active"
    accounts.enter("c")
    assert accounts.state("a") == Standing("released", reason="cap")
    assert accounts.state("b").phase == accounts.state("c").phase == "active"


def test_a_session_ends_after_five_idle_minutes():
    """Counted from the last entry's end; an entry under way is not idle, however long."""
    accounts, clock = trial()
    accounts.enter("a")
    clock.now = 20 * MINUTE
    assert accounts.state("a").phase == "active"
    accounts.leave("a")
    clock.now += 5 * MINUTE - 1
    assert accounts.state("a").phase == "active"
    clock.now += 1
    assert accounts.state("a") == Standing("released", reason="idle")
    accounts.enter("a")
    assert accounts.state("a") == Standing("active")


def test_a_place_in_line_is_lost_by_not_asking():
    """So that no session waits for somebody who has gone; those who obey `retry_after` keep theirs."""
    accounts, clock = trial()
    accounts.enter("a")
    waits(accounts, "gone")
    pause = waits(accounts, "b")
    while clock.now < 6 * MINUTE:
        clock.now += pause
        assert accounts.state("b").phase == "waiting"
        pause = waits(accounts, "b")
    assert accounts.state("gone") == Standing("released", reason="idle")
    assert accounts.state("b") == Standing("waiting", 1)


def test_who_gets_a_session_has_five_minutes_to_use_it():
    """However long ago it asked."""
    accounts, clock = trial()
    accounts.enter("a")
    waits(accounts, "b")
    clock.now = 4 * MINUTE
    accounts.close("a")
    clock.now += 4 * MINUTE
    assert accounts.state("b") == Standing("active")


STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "close", "pass"]), st.sampled_from("abcd"), st.integers(0, 20)),
    max_size=60,
)


@given(STEPS, st.integers(1, 3))
def test_whatever_happens_the_rules_hold(steps, sessions):
    """Never more sessions or entries than allowed, positions without gaps, no free session while somebody waits."""
    accounts, clock = trial(sessions, entries=3)
    entries = Counter()
    for step, account, minutes in steps:
        if step == "enter":
            before = accounts.state(account).phase
            try:
                accounts.enter(account)
                entries[account] += 1
                assert accounts.state(account).phase == "active"
            except AccountLimit as limit:
                assert 1 <= limit.retry_after <= 30 * MINUTE
                assert before != "active" or entries[account] == 3
        elif step == "leave" and entries[account]:
            accounts.leave(account)
            entries[account] -= 1
        elif step == "close":
            accounts.close(account)
        else:
            clock.now += minutes * MINUTE
        standings = [accounts.state(name) for name in "abcd"]
        active = sum(standing.phase == "active" for standing in standings)
        positions = sorted(standing.position for standing in standings if standing.phase == "waiting")
        assert max(entries.values(), default=0) <= 3
        assert active <= sessions
        assert positions == [*range(1, len(positions) + 1)]
        assert active == sessions or not positions


def test_usage_counts_a_prompt_once():
    """Two samples of one request read its prompt once; what an account took adds up, apart from others."""
    accounts, _ = trial(sessions=None)
    for account in ("a", "a", "b"):
        accounts.enter(account)
    accounts.leave("a", usage(100, 40, 7), usage(100, 100, 8))
    accounts.leave("a", usage(10, 0, 1))
    accounts.leave("b")
    assert accounts.usage("a") == Tokens(prompt=110, cached=40, generated=16)
    assert accounts.usage("b") == accounts.usage("nobody") == Tokens()


def test_one_account_is_first_in_first_out():
    order = FairOrder[int]()
    for item in range(5):
        order.push("", item)
    assert [*order] == [0, 1, 2, 3, 4]
    assert [(order.pop(), order.charge("", 1000)) for _ in range(5)] == [(item, None) for item in range(5)]
    with pytest.raises(IndexError):
        order.pop()


COSTS = st.lists(st.integers(1, 100), min_size=1, max_size=40)


@given(st.dictionaries(st.sampled_from("abc"), COSTS, min_size=2))
def test_accounts_that_wait_are_served_alike(costs):
    """While two accounts wait, their tokens differ by less than two of the largest requests, in any stretch of time."""
    order, served = FairOrder[tuple[str, int]](), Counter()
    for account, sizes in costs.items():
        for size in sizes:
            order.push(account, (account, size))
    largest = max(itertools.chain(*costs.values()))
    waiting = Counter({account: len(sizes) for account, sizes in costs.items()})
    history = []
    while all(waiting.values()):
        account, size = order.pop()
        order.charge(account, size)
        served[account] += size
        waiting[account] -= 1
        history.append({account: served[account] for account in costs})
    for one, other in itertools.combinations(costs, 2):
        gaps = [0] + [tokens[one] - tokens[other] for tokens in history]
        assert max(gaps) - min(gaps) <= 2 * largest


def test_a_light_account_waits_for_one_request_of_a_heavy_one():
    """However long the heavy one's queue, and whether the light one comes first, last, or again and again."""
    order = FairOrder[str]()
    for _ in range(100):
        order.push("heavy", "heavy")
    for _ in range(20):
        for _ in range(3):
            assert order.pop() == "heavy"
            order.charge("heavy", 50)
        order.push("light", "light")
        if order.pop() == "heavy":
            order.charge("heavy", 50)
            assert order.pop() == "light"
        order.charge("light", 10)


@pytest.mark.parametrize("left", [0, 20])
def test_being_away_earns_nothing(left):
    """An account that comes back after others were served much shares with them from then on; it does not catch up.

    Also if it finds the queue empty.
    """
    order = FairOrder[str]()
    order.push("new", "new")
    order.charge("new", 5)
    order.pop()
    for _ in range(20 + left):
        order.push("old", "old")
    for _ in range(20):
        order.charge(order.pop(), 100)
    for _ in range(20):
        order.push("new", "new")
    for _ in range(20 - left):
        order.push("old", "old")
    turns = []
    for _ in range(20):
        turns.append(order.pop())
        order.charge(turns[-1], 100)
    assert turns.count("new") == 10


ACTIONS = st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.sampled_from("abc"), st.integers(0, 9)))


@given(ACTIONS)
def test_nothing_is_lost_or_served_twice(actions):
    """Against a plain list: what goes in comes out once, of each account in its order."""
    order, expected, numbers = FairOrder[list](), list[list](), itertools.count()
    for action, account, number in actions:
        if action == "push":
            expected.append([account, next(numbers)])
            order.push(account, expected[-1])
        elif action == "pop" and expected:
            item = order.pop()
            assert item is next(one for one in expected if one[0] == item[0])
            expected.remove(item)
            order.charge(item[0], number)
        elif action == "remove" and expected:
            order.remove(expected.pop(number % len(expected)))
        assert [*order] == expected
        assert len(order) == len(expected)
    for item in expected:
        with pytest.raises(ValueError):
            order.remove([*item])  # equals it, and is another
