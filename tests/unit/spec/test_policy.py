"""The grammar of layer policies."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SelectionError
from orchestrator.spec import Policy, normal_form, parse_policy

RUNS = st.sets(st.integers(0, 40), min_size=1).map(lambda blocks: ",".join(map(str, blocks)))
POLICIES = st.one_of(
    st.sampled_from(["none", "head", "all", "all+head"]),
    st.builds("{}:{}{}".format, st.sampled_from(["last", "first"]), st.integers(1, 99), st.sampled_from(["", "+head"])),
    st.builds("blocks:{}{}".format, RUNS, st.sampled_from(["", "+head"])),
    st.builds("top:{:g}".format, st.floats(0.01, 1)),
)


@given(POLICIES)
def test_the_normal_form_is_a_fixed_point(text: str) -> None:
    policy = parse_policy(text)
    assert parse_policy(str(policy)) == policy
    assert normal_form(str(policy)) == str(policy)


@given(POLICIES, st.text(alphabet=" \t", max_size=2))
def test_spaces_and_case_mean_nothing(text: str, space: str) -> None:
    spaced = space + space.join([*text.upper()]) + space
    assert parse_policy(spaced) == parse_policy(text)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("last: 2", "last:2"),
        ("first:02 + head", "first:2+head"),
        ("blocks:8,0-3", "blocks:0-3,8"),
        ("blocks:0-3,2,4", "blocks:0-4"),
        ("blocks:5", "blocks:5"),
        ("ALL", "all"),
        ("top:.250", "top:0.25"),
        ("all+router+head", "all+head+router"),
    ],
)
def test_normal_forms(text: str, normal: str) -> None:
    assert normal_form(text) == normal


def test_a_policy_is_understood() -> None:
    assert parse_policy("blocks:0-1,4+head") == Policy("blocks", ranges=((0, 1), (4, 4)), extras=("head",))
    assert parse_policy("last:3") == Policy("last", count=3)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("lst:2", "did you mean last:2?"),
        ("last2", "did you mean last:2?"),
        ("last=2", "did you mean last:2?"),
        ("last-2", "did you mean last:2?"),
        ("last(2)", "did you mean last"),
        ("4", "did you mean last:4?"),
        ("hed", "did you mean head?"),
        ("alll", "did you mean all?"),
        ("block:0-3", "did you mean blocks:0-3?"),
        ("last:2+lm_head", "did you mean last:2+head?"),
        ("last", "write last:2"),
        ("last:two", "write last:2"),
        ("last:-1", "write last:2"),
        ("last:0", "write none"),
        ("last:²", "write last:2"),
        ("all:3", "write all"),
        ("head+head", "write head"),
        ("blocks:", "write blocks:0-3,8"),
        ("blocks:1--2", "write blocks:0-3,8"),
        ("blocks:5-2", "write blocks:2-5"),
        ("top:0", "write top:0.25"),
        ("top:nan", "write top:0.25"),
        ("top:1.5", "write top:0.25"),
        ("everything", "write for example last:2"),
        ("", "write for example last:2"),
    ],
)
def test_a_wrong_policy_names_the_near_one(text: str, remedy: str) -> None:
    with pytest.raises(SelectionError) as caught:
        parse_policy(text)
    assert caught.value.remedy.startswith(remedy)
    assert repr(text) in str(caught.value)
    assert "last:N" in caught.value.expected


@given(st.text(max_size=12))
def test_no_text_breaks_the_grammar(text: str) -> None:
    with contextlib.suppress(SelectionError):
        parse_policy(text)
