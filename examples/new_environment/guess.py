"""An environment of your own: guess a digit, hear whether it is higher or lower, guess again."""

from dataclasses import dataclass

from opd.ports import Outcome
from opd.types import Prompt


@dataclass(kw_only=True)
class GuessDigit:
    """The last digit of a turn is the guess. Every trajectory plays with a copy, so `self` may remember."""

    higher: str = " higher "
    lower: str = " lower "

    def reset(self, prompt: Prompt) -> str:
        """First observation: none, because the prompt has the whole task."""
        self.secret = int(prompt.answer)
        return ""

    def step(self, action: str) -> Outcome:
        """1 for the digit; a hint otherwise. `method.rollout.max_turns` ends the game."""
        digits = [c for c in action if c.isdigit()]
        if not digits:
            return Outcome(reward=-1.0, done=True)
        guess = int(digits[-1])
        hint = self.higher if guess < self.secret else self.lower
        return Outcome(reward=float(guess == self.secret), done=guess == self.secret, text=hint)
