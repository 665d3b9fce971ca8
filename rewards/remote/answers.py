"""Questions for a vision-language model, and the scores in its answers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import isfinite, nan

from rewards.remote.transport import quote

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class AnswerFormat:
    r"""How an answer states a score, and the scale of that score.

    Args:
        owner: Name of the reward, for error messages.
        pattern: Regular expression of Python's `re`. Each group matches a number of the answer. The first match counts.
        lowest: Lowest number that an answer may state.
        highest: Highest number that an answer may state.
        divide_by: Divisor of the number, > 0. None: map `lowest` to 0 and `highest` to 1.

    Raises:
        ValueError: if the pattern does not compile or has no group, or a number is out of range.

    >>> style = AnswerFormat("Mine", r"Style: (\d+)\D+Mood: (\d+)", lowest=0, highest=10)
    >>> style.score("Style: 8, Mood: 6"), style.score("Style: 80, Mood: 6"), style.score("A fine image.")
    (0.7, nan, nan)
    """

    owner: str
    pattern: str
    lowest: float
    highest: float
    divide_by: float | None = None
    _compiled: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_compiled", re.compile(self.pattern))
        except re.error as error:
            raise ValueError(
                f"{self.owner}: `pattern` must be a regular expression. Found '{quote(self.pattern)}': {error}. Correct it."
            ) from error
        if not self._compiled.groups:
            raise ValueError(
                f"{self.owner}: `pattern` must have a group for each number. Found none in '{quote(self.pattern)}'. "
                r"Put the number in parentheses: Score: (\d+)."
            )
        if not (isfinite(self.lowest) and isfinite(self.highest) and self.lowest < self.highest):
            raise ValueError(
                f"{self.owner}: `lowest` must be < `highest`, both finite. Found {self.lowest} and {self.highest}. "
                "Use the range that the question states."
            )
        if self.divide_by is not None and not (isfinite(self.divide_by) and self.divide_by > 0):
            raise ValueError(
                f"{self.owner}: `divide_by` must be > 0. Found {self.divide_by}. Use null for scores from 0 to 1."
            )

    def score(self, answer: str) -> float:
        """Return the mean of the numbers in `answer`, scaled; NaN if one is absent, not a number or out of range."""
        match = self._compiled.search(answer)
        try:
            numbers = [float(text) for text in match.groups()] if match else [nan]
        except (TypeError, ValueError):  # an optional group without a match, or a group that is no number
            return nan
        if not all(self.lowest <= number <= self.highest for number in numbers):
            return nan
        mean = sum(numbers) / len(numbers)
        if self.divide_by is not None:
            return mean / self.divide_by
        return (mean - self.lowest) / (self.highest - self.lowest)


def check_question(owner: str, question: str, placeholder: str) -> str:
    """Return `question` if it holds {placeholder} and no other name in braces.

    Raises:
        ValueError: if it does not.
    """
    names = set(PLACEHOLDER.findall(question))
    if placeholder not in names:
        raise ValueError(f"{owner}: `question` must hold {{{placeholder}}}. Found '{quote(question)}'. Add the placeholder.")
    if unknown := sorted(names - {placeholder}):
        raise ValueError(
            f"{owner}: `question` must hold no placeholder but {{{placeholder}}}. Found {{{'}, {'.join(unknown)}}}. "
            "Remove the braces."
        )
    return question
