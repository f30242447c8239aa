"""Guesses are what followed the last tokens before, whatever the text."""

from hypothesis import given
from hypothesis import strategies as st

from llmcomp.prompt_lookup import Lookup


def lookup(text: str, longest: int = 2) -> Lookup:
    found = Lookup(longest)
    found.extend(map(ord, text))
    return found


def guess(text: str, count: int = 4, longest: int = 2, ending: str = "") -> str:
    return "".join(map(chr, lookup(text, longest).guess(count, [ord(c) for c in ending])))


def test_what_followed_the_last_time() -> None:
    assert guess("the cat, the ") == "cat,"
    assert guess("abc abd ab") == "d ab"
    assert guess("aaaa") == "a"


def test_a_longer_match_wins_over_a_later_one() -> None:
    assert guess("xab1 yb2 xab", longest=3) == "1 yb"
    assert guess("xab1 yb2 xab", longest=1) == "2 xa"


def test_no_guess() -> None:
    assert guess("") == guess("a") == guess("abcdef") == ""
    assert guess("abab", count=0) == guess("abab", count=-1) == ""


def test_a_guess_ends_before_a_token_that_ends_the_text() -> None:
    assert guess("ab.cd ab", ending=".") == ""
    assert guess("abc.d ab", ending=".;") == "c"


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.integers(0, 6))
def test_against_a_search_of_the_whole_text(tokens: list[int], longest: int, count: int) -> None:
    found = Lookup(longest)
    found.extend(tokens)
    assert found.guess(count) == search(tokens, longest, count)


def search(tokens: list[int], longest: int, count: int) -> list[int]:
    """The same by looking through the text from its end."""
    for n in range(min(longest, len(tokens)), 0, -1):
        for start in range(len(tokens) - 1, n - 1, -1):
            if tokens[start - n : start] == tokens[-n:]:
                return tokens[start : start + count]
    return []
