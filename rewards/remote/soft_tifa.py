"""GenEval 2's questions and the soft score of an answer, as pure functions of prompt metadata and log-probabilities.

Source: Kamath et al., "GenEval 2: Addressing Benchmark Drift in Text-to-Image Evaluation", 2025: Soft-TIFA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.texts import excerpt

COUNTING = "How many"
"""How a question begins whose answer is a number. The answer to every other question is "Yes"."""
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def read_questions(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the questions of a prompt with the answers of a correct image.

    >>> read_questions({"vqa_list": [["How many cows are in the image?", "two"], ["Are the cows red?", "Yes"]]})
    [('How many cows are in the image?', 'two'), ('Are the cows red?', 'Yes')]

    Raises:
        ValueError: if `vqa_list` is not a list of pairs of texts, or an answer is not the number of a counting question, one
            to ten, or the "Yes" of any other question.
    """
    pairs = metadata.get("vqa_list")
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not pairs:
        raise ValueError(
            f"GenEval2: `vqa_list` must be a list of questions and answers. Found {excerpt(pairs)}. Add a pair such as "
            "['Are there any cows in the image?', 'Yes']."
        )
    return [_check_pair(pair) for pair in pairs]


def _check_pair(pair: Any) -> tuple[str, str]:
    match pair:
        case [str(question), str(answer)] if answer in (NUMBERS if question.startswith(COUNTING) else ("Yes",)):
            return question, answer
    raise ValueError(
        f"GenEval2: an entry of `vqa_list` must be a question and its answer: one of {', '.join(NUMBERS)} if the question "
        f"begins with '{COUNTING}', otherwise Yes. Found {excerpt(pair)}. Correct the prompt file."
    )


def spellings(*answers: str) -> set[str]:
    """Return the tokens that count as one of `answers`: in small letters or capitalised, a number as digit, after a space.

    >>> sorted(spellings("two"))
    [' 2', ' Two', ' two', '2', 'Two', 'two']
    """
    words = {word for answer in answers for word in (answer.lower(), answer.capitalize())}
    words |= {str(NUMBERS.index(answer) + 1) for answer in answers if answer in NUMBERS}
    return words | {f" {word}" for word in words}


def answer_probability(answer: str, tokens: Sequence[tuple[str, float]]) -> float:
    """Return the probability that a model gives to a correct answer, the sum over the tokens that spell it.

    A server lists only the likeliest tokens. If none of them spells the answer, its probability is taken to be that of the
    last one listed, which is an upper bound for each spelling. If none of them is an answer at all, a number to a counting
    question or yes or no to another, the probability is NaN: the model did not answer in one word.

    Args:
        answer: The correct answer, as `read_questions` returns it.
        tokens: The likeliest first tokens of the model's answer, with their natural log-probabilities.

    >>> round(answer_probability("two", [("Two", math.log(0.6)), ("2", math.log(0.3)), ("Three", math.log(0.1))]), 6)
    0.9
    >>> round(answer_probability("two", [("Three", math.log(0.8)), ("Four", math.log(0.1))]), 6)
    0.1
    >>> answer_probability("two", [("<think>", 0.0)])
    nan
    """
    correct = spellings(answer)
    found = [math.exp(logprob) for token, logprob in tokens if token in correct]
    if found:
        return math.fsum(found)
    possible = spellings("zero", "0", "no", *NUMBERS) if answer in NUMBERS else spellings("yes", "no")
    if not any(token in possible for token, _ in tokens):
        return math.nan
    return math.exp(min(logprob for _, logprob in tokens))
