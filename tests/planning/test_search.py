"""The search for sizes that fit: what it suggests can be run, and fits where anything does."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_plan import tiny

from gdsd_jax.config import TrainConfig
from gdsd_jax.planning.search import meshes, search
from gdsd_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TrainConfig:
    """A config of a model that two chips can share by heads; it leaves its sizes open."""
    config = tiny(tmp_path_factory.mktemp("search") / "base")
    return dataclasses.replace(config, microbatch_rows=None)


def found(config: TrainConfig, room: int, chips: int = 4, compilations: int = 100, **flags) -> tuple:
    """Returns what the search suggests for a compiler that finds `room` rows to fit a chip, and what it tried."""
    tried = []

    def measure(config, name):
        rows = config.prompts_per_iteration * config.group_size
        rows = config.microbatch_rows if name == "update" else config.rollout_rows or rows
        return {"fits": rows <= room, "peak_bytes": rows, "temporary_bytes": rows, "hbm_bytes": room}

    def report(config, name, result):
        tried.append((name, config, result["fits"]))

    return search(config, chips, measure, report, compilations=compilations, **flags), tried


@examples(max_examples=80, deadline=None)
@given(st.data())
def test_what_is_suggested_can_be_run(base, data):
    """Groups, shards, refills and rows of an update divide what they have to, whatever their sizes."""
    draw = lambda low, high, name: data.draw(st.integers(low, high), name)  # noqa: E731
    prompts, group, chips = draw(1, 12, "prompts"), draw(2, 8, "group"), draw(1, 8, "chips")
    divisors = [None, *(n for n in range(1, prompts * group + 1) if prompts * group % n == 0)]
    refill = {"rounds": draw(0, 2, "rounds"), "prompts": draw(0, prompts, "again")}
    try:
        config = dataclasses.replace(
            base, prompts_per_iteration=prompts, group_size=group,
            update_rows=data.draw(st.sampled_from(divisors), "update_rows"),
            refill=dataclasses.replace(base.refill, **refill),
        )  # fmt: skip
    except UserError:
        assume(False)
    room = draw(1, 200, "room")
    # A config refuses sizes that do not divide each other when it is made, so that the search would fail here.
    best, tried = found(config, room, chips)
    for name, other, _ in tried:
        shards = other.mesh.data * other.mesh.fsdp
        rows = other.microbatch_rows if name == "update" else other.rollout_rows or prompts * group
        assert rows % shards == 0
        if name == "sampler" and other.rollout_rows:
            assert rows % group == 0
    smallest = min((o.microbatch_rows for name, o, _ in tried if name == "update"), default=room + 1)
    assert (best is None) == (smallest > room or not meshes(config, chips))
    if best is not None:
        assert best.microbatch_rows <= room


@pytest.mark.parametrize(
    ("changes", "room", "microbatch", "rollout"),
    [
        # Rows of an update, not of a rollout, are what micro-batches divide.
        ({"prompts_per_iteration": 12, "update_rows": 24}, 30, 24, 24),
        # Parts of a third, where a half has no whole groups on all chips.
        ({"prompts_per_iteration": 9}, 12, 12, 12),
        # A part divides the prompts of a refill too.
        ({"prompts_per_iteration": 8, "refill": (2, 3)}, 16, 16, 4),
    ],
)
def test_sizes_that_fit(base, changes, room, microbatch, rollout):
    if "refill" in changes:
        rounds, prompts = changes["refill"]
        changes = changes | {"refill": dataclasses.replace(base.refill, rounds=rounds, prompts=prompts)}
    best, tried = found(dataclasses.replace(base, **changes), room)
    assert (best.microbatch_rows, best.rollout_rows) == (microbatch, rollout)
    assert tried[-1] == ("sampler", best, True)


def test_a_rollout_grows_only_as_long_as_it_gains(base):
    """To the 8192 tokens of a chip, which has rows of 24 and 16 tokens in groups of 4, and not to all of its memory."""
    best, tried = found(base, 10**9, chips=1)
    assert best.prompts_per_iteration == 32 and len(tried) < 8
    apart = dataclasses.replace(base, rollout_rows=4)
    assert found(apart, 10**9, chips=1)[0].prompts_per_iteration == 2
    assert {name for name, _, _ in found(base, 10**9, chips=1, sampler=False)[1]} == {"update"}


def test_a_search_ends(base):
    """With the best so far, or with nothing; where no part of a rollout fits, it gives the smallest."""
    large = dataclasses.replace(base, prompts_per_iteration=64)
    for compilations in range(1, 6):
        best, tried = found(large, 4, chips=1, compilations=compilations)
        assert len(tried) <= compilations and best.microbatch_rows == 4
    assert found(base, 1, chips=1)[0] is None
    best, tried = found(dataclasses.replace(base, group_size=4), 4, chips=1)
    assert best.rollout_rows == 4 and tried[-1] == ("sampler", best, True)
