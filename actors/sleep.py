"""Sleep of an engine: memory that it gives up while another role of the run works on the same device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd.errors import ConfigurationError
from opd.ports import PublishedWeights
from weight_sync.receiver import ReceivedWeights, check_unchanged

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

_KEPT, _GIVEN_UP = 1, 2  # vLLM's levels of sleep: weights go to host memory, or nowhere


@dataclass(slots=True, kw_only=True)
class EngineSleep:
    """Whether an engine sleeps, and the weights that it must load again before it writes. Used on the engine's thread.

    `reloads`: what is published are all of its weights, so that it need not keep a copy of its own: those that it
    received last are in host memory already.
    """

    on_gpu: bool
    reloads: bool
    asleep: bool = False
    last: tuple[PublishedWeights, ReceivedWeights] | None = None
    lacks_weights: bool = False

    def fall(self, engine: "LLMEngine") -> None:
        """Give up memory; the engine has no requests."""
        if self.asleep:
            return
        keep = self.last is None and not self.lacks_weights
        if self.on_gpu:
            engine.sleep(level=_KEPT if keep else _GIVEN_UP)
        else:
            engine.reset_prefix_cache()
            engine.collective_rpc("park_memory", kwargs={"keep": keep})
        self.asleep, self.lacks_weights = True, not keep

    def end(self, engine: "LLMEngine") -> None:
        """Take memory back, and weights that were kept."""
        if not self.asleep:
            return
        if self.on_gpu:
            engine.wake_up()
        else:
            engine.collective_rpc("unpark_memory")
        self.asleep = False

    def received(self, weights: PublishedWeights, delivered: ReceivedWeights) -> None:
        """Note which weights are loaded now."""
        self.lacks_weights = False
        if self.reloads and not weights.manifest.lora_scale:
            self.last = weights, delivered

    def lacking(self) -> tuple[PublishedWeights, ReceivedWeights] | None:
        """Weights to load before anything is written, if any; they are still those that were published.

        Raises:
            DataError: they are not.
        """
        if not self.lacks_weights or self.last is None:
            return None
        check_unchanged(*self.last, "the student engine")
        return self.last

    def check_awake(self) -> None:
        """Raise `ConfigurationError` if the engine sleeps."""
        if self.asleep:
            raise ConfigurationError("the student engine sleeps, its memory is given up; call wake() before")
