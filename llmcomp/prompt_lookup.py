"""Guesses of the tokens that come next, looked up in the text so far.

    text   ... for name in names: print(name) ... for name in
    guess                                                    names: print(

The last few tokens are looked for in the prompt and in what was generated since, the longest n-gram first; what
followed them the last time is the guess. The model then checks all of it in one call, and keeps the part that it
would have chosen itself.

Saxena, "Prompt lookup decoding" (2023), https://github.com/apoorvumang/prompt-lookup-decoding. There, text is
searched anew at every step; here every n-gram is noted once, so that a guess takes the same time behind any text.
"""

from collections.abc import Collection, Iterable

NGRAM = 2  # transformers' default for the longest n-gram


class Lookup:
    """The tokens of one text, and where each of their n-grams was last followed by something."""

    def __init__(self, longest: int = NGRAM) -> None:
        """`longest` is the length of the n-grams that are looked for first; below it, shorter ones."""
        self.longest = longest
        self.tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end of the text."""
        for token in tokens:
            # Noted when the next token comes: the n-gram at the very end is what is looked up.
            for n in range(1, min(self.longest, len(self.tokens)) + 1):
                self._follows[tuple(self.tokens[-n:])] = len(self.tokens)
            self.tokens.append(token)

    def guess(self, count: int, ending: Collection[int] = ()) -> list[int]:
        """At most `count` tokens that may come next, up to one of `ending`; none where the text gives no hint."""
        for n in range(min(self.longest, len(self.tokens)), 0, -1):
            start = self._follows.get(tuple(self.tokens[-n:]))
            if start is not None:
                return _before(self.tokens[start : start + max(count, 0)], ending)
        return []


def _before(tokens: list[int], ending: Collection[int]) -> list[int]:
    end = next((i for i, t in enumerate(tokens) if t in ending), len(tokens))
    return tokens[:end]
