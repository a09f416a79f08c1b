"""A reward of your own: one function. The names of its parameters say what it is given."""


def short_and_right(completion: str, answer: str, per_word: float = 0.01) -> float:
    """1 if the completion ends with the answer, less `per_word` for every word."""
    right = completion.split()[-len(answer.split()) :] == answer.split()
    return float(right) - per_word * len(completion.split())
