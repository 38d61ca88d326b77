"""How long writing takes: the prompt, the first token, and those that follow, apart."""

import time
from dataclasses import dataclass, field


@dataclass
class Stats:
    """What Generation tells of its steps; one object may be told of several Generations, one after the other.

    The prompt and the first token are those of the first one.  Time begins when the object is made; the time between
    two steps does not count.
    """

    prompt: int = 0  # tokens that were read
    prompt_seconds: float = 0.0
    first_seconds: float = 0.0  # until the first token was there, or as many as the first step draws
    tokens: int = 0  # that came in later steps, of all texts
    seconds: float = 0.0  # of these steps
    proposed: int = 0  # tokens of drafts
    accepted: int = 0  # those of them that were written
    began: float = field(default_factory=time.perf_counter)

    def read(self, tokens, seconds, now):
        """The first step of a Generation is done."""
        if not self.prompt:
            self.prompt, self.prompt_seconds, self.first_seconds = tokens, seconds, now - self.began

    def wrote(self, tokens, seconds):
        """Another step is done."""
        self.tokens += tokens
        self.seconds += seconds

    def __str__(self):
        words = f"{self.prompt} token{'s' * (self.prompt > 1)} of the prompt in {self.prompt_seconds * 1e3:,.1f} ms"
        words += f", the first one written after {self.first_seconds * 1e3:,.1f} ms"
        if self.tokens:
            words += f", then {self.tokens / self.seconds:,.1f} tokens a second"
        if self.proposed:
            words += f"; {self.accepted:,} of {self.proposed:,} drafted tokens were right"
        return words
