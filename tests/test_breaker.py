"""The breaker as a state machine, step by step and against plain rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from whisper_fast.breaker import Breaker


def opened(now=0.0, **options):
    breaker = Breaker(**options)
    for _ in range(breaker.failures):
        breaker.failed(breaker.enter(now), now)
    assert breaker.state == "open"
    return breaker


def test_it_opens_on_failures_in_a_row_and_a_success_starts_the_row_anew():
    breaker = Breaker(failures=3)
    for _ in range(2):
        breaker.failed(breaker.enter(0), 0)
    breaker.succeeded(breaker.enter(0))
    for _ in range(2):
        breaker.failed(breaker.enter(0), 0)
        assert breaker.state == "closed"
    breaker.failed(breaker.enter(0), 0)
    assert (breaker.state, breaker.enter(0.9), breaker.opened) == ("open", -1, 1)


def test_it_opens_when_most_calls_fail_though_never_many_in_a_row():
    breaker = Breaker()
    for number in range(200):
        if breaker.state != "closed":
            break
        breaker.succeeded(breaker.enter(0)) if number % 4 == 0 else breaker.failed(breaker.enter(0), 0)
    assert breaker.state == "open"
    breaker = Breaker()
    for number in range(1000):
        breaker.failed(breaker.enter(0), 0) if number % 4 == 0 else breaker.succeeded(breaker.enter(0))
    assert breaker.state == "closed", "a quarter of failures is no outage"


def test_exactly_one_probe_under_ten_thousand_callers():
    breaker = opened()
    assert [breaker.enter(0.99) for _ in range(10_000)] == [-1] * 10_000
    passes = [breaker.enter(1.0) for _ in range(10_000)]
    assert sum(number > 0 for number in passes) == 1
    assert breaker.state == "half-open"
    breaker.succeeded(passes[0])
    assert [breaker.enter(1.0) for _ in range(3)] == [0, 0, 0]


def test_a_failed_probe_doubles_the_cooldown_up_to_the_longest():
    breaker, now, waits = opened(cooldown=1, longest=8), 0.0, []
    for _ in range(6):
        waits.append(breaker.wait(now))
        now += breaker.wait(now)
        breaker.failed(breaker.enter(now), now)
    assert waits == [1, 2, 4, 8, 8, 8]
    now += 8
    breaker.succeeded(breaker.enter(now))
    for _ in range(5):
        breaker.failed(breaker.enter(now), now)
    assert breaker.wait(now) == 1, "closed once, it starts anew"


def test_a_lost_probe_does_not_wedge_it():
    breaker = opened(lease=10)
    lost = breaker.enter(1)
    assert breaker.enter(10.9) == -1
    second = breaker.enter(11)
    assert second > lost
    breaker.failed(lost, 11)
    breaker.succeeded(lost)
    assert breaker.state == "half-open", "its lease is over, what it says is too late"
    breaker.succeeded(second)
    assert breaker.state == "closed"


def test_a_probe_that_is_given_up_leaves_its_place_at_once():
    breaker = opened()
    breaker.left(breaker.enter(1))
    assert breaker.enter(1) > 0
    breaker.left(0)
    assert breaker.enter(1) == -1


def test_calls_from_before_change_nothing_any_more():
    breaker = Breaker()
    early = [breaker.enter(0) for _ in range(20)]
    for pass_ in early[:5]:
        breaker.failed(pass_, 0)
    for pass_ in early[5:12]:
        breaker.failed(pass_, 0.5)
    breaker.succeeded(early[12])
    assert (breaker.state, breaker.opened, breaker.wait(0)) == ("open", 1, 1.0)
    breaker.enter(1)
    breaker.succeeded(early[13])
    breaker.failed(early[14], 1)
    assert breaker.state == "half-open"


def test_retry_after_is_respected_but_not_for_ever():
    breaker = Breaker(failures=1, longest=30)
    breaker.failed(breaker.enter(0), 0, retry_after=7)
    assert breaker.wait(0) == 7
    breaker = Breaker(failures=1, longest=30)
    breaker.failed(breaker.enter(0), 0, retry_after=1e9)
    assert breaker.wait(0) == 30


STEPS = st.lists(st.tuples(st.sampled_from(["enter", "ok", "bad", "left"]), st.integers(0, 9), st.floats(0, 3)))


@given(STEPS)
def test_there_is_never_a_second_living_probe_and_never_a_deadlock(steps):
    breaker, now, passes, probe = Breaker(failures=2, lease=5), 0.0, [], None
    for act, which, passed in steps:
        now += passed
        if act == "enter":
            number = breaker.enter(now)
            if number > 0:
                assert probe is None or now >= probe[1]
                probe = (number, now + 5)
            if number >= 0:
                passes.append(number)
        elif passes:
            number = passes.pop(which % len(passes))
            if act == "ok":
                breaker.succeeded(number)
            elif act == "bad":
                breaker.failed(number, now)
            else:
                breaker.left(number)
            if probe and number == probe[0]:
                probe = None
        assert breaker.state in ("closed", "open", "half-open")
    assert breaker.enter(now + breaker.wait(now)) >= 0
