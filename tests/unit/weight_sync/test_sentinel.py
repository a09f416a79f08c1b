"""The sentinel finds wrong weights in either dtype, and never takes rounding for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.model import Student, load_student
from tests.tiny_models import VOCABULARY, logprobs, save, tiny_model
from weight_sync.sentinel import LONGEST, NUMERICS, SHORTEST, TIMES, Gap, allowed, text

PublishedWeights = dict[str, Tensor]
Fault = Callable[[str, PublishedWeights, PublishedWeights, torch.Generator], Tensor]
F32, BF16 = torch.float32, torch.bfloat16
PAIRS = [(F32, F32), (BF16, F32), (F32, BF16), (BF16, BF16)]
IDS = text(np.random.default_rng(3).integers(3, VOCABULARY, 90).tolist(), VOCABULARY, 97)


@dataclass
class Both:
    """The two programs: a plain forward pass for the engine, the packed student of the learner."""

    engines: dict[torch.dtype, torch.nn.Module]
    learners: dict[torch.dtype, Student]

    def gap(
        self, pair: tuple[torch.dtype, torch.dtype], published: PublishedWeights, loaded: PublishedWeights | None = None
    ) -> Gap:
        """What an engine that `loaded` says, against a learner that has `published`."""
        engine, learner = self.engines[pair[0]], self.learners[pair[1]]
        engine.load_state_dict(loaded or published, strict=False)
        learner.causal.load_state_dict(published, strict=False)
        ids = torch.from_numpy(IDS).long()
        heard = logprobs(engine, IDS)[:-1].gather(-1, ids[1:, None])[:, 0]  # type: ignore[arg-type]
        return Gap.of(heard.numpy(), learner.logprobs(ids).numpy())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    path = save(tiny_model(7, tied=False, positions=LONGEST), tmp_path_factory.mktemp("student"))
    return Both(
        engines={d: tiny_model(7, tied=False, positions=LONGEST).to(d) for d in (F32, BF16)},
        learners={d: load_student(str(path), d, False) for d in (F32, BF16)},
    )


def weights(seed: int = 7, scale: float = 1.0) -> PublishedWeights:
    """A version of the student; a larger `scale` makes it sharper."""
    model = tiny_model(seed, tied=False, positions=LONGEST)
    return {n: p.detach() * (scale if "norm" not in n else 1.0) for n, p in model.named_parameters()}


def trained(before: PublishedWeights, by: float = 0.1) -> PublishedWeights:
    """The version after an update: every weight has moved by a tenth of what weights are."""
    draw = torch.Generator().manual_seed(1)
    return {n: w + by * w.abs().mean() * torch.randn(w.shape, generator=draw).sign() for n, w in before.items()}


def versions() -> Iterator[PublishedWeights]:
    yield from (weights(), trained(weights()), weights(8), weights(7, 0.1), weights(7, 1.3))


@pytest.mark.parametrize("pair", PAIRS)
def test_right_weights_never_fire(both: Both, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Whatever the two dtypes are, and also for students that are much flatter or sharper than the checkpoint."""
    bound = allowed(both.gap(pair, weights()), coarse=BF16 in pair)
    for published in versions():
        found = both.gap(pair, published)
        assert found.within(bound), f"{found} of {bound}"


FAULTS: dict[str, Fault] = {
    "noise": lambda n, new, old, draw: torch.randn(new[n].shape, generator=draw) * new[n].std().nan_to_num(1),
    "never loaded": lambda n, new, old, draw: torch.zeros_like(new[n]),
    "of another version": lambda n, new, old, draw: old[n],
    "transposed": lambda n, new, old, draw: new[n].flatten().reshape(new[n].shape[::-1]).T.contiguous(),
}
UNSEEN = {
    # A gain of ones that was moved by an update, or is a constant vector: nothing that a text could show.
    "transposed": lambda n: "norm" in n,
    "noise": lambda n: False,
    "never loaded": lambda n: False,
    "of another version": lambda n: False,
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_wrong_tensor_is_found(both: Both, fault: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    # In bfloat16 a single attention matrix of the last layer that is a tenth stale (0.04 nats) drowns in rounding
    # (0.02, of which four times are allowed); in float32 it does not.
    old, new, draw = weights(), trained(weights(), 0.4 if BF16 in pair else 0.1), torch.Generator().manual_seed(2)
    bound = allowed(both.gap(pair, old), coarse=BF16 in pair)
    missed = []
    for name in new:
        if UNSEEN[fault](name):
            continue
        wrong = {**new, name: FAULTS[fault](name, new, old, draw)}
        found = both.gap(pair, new, wrong)
        if found.within(bound):
            missed.append(f"{name}: {found}")
    assert not missed, f"{len(missed)} of {len(new)} with {bound}: {missed}"


@pytest.mark.parametrize("pair", PAIRS)
def test_a_layer_and_a_whole_version_that_did_not_come_are_found(
    both: Both, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    old, new = weights(), trained(weights())
    bound = allowed(both.gap(pair, old), coarse=BF16 in pair)
    layer = {**new, **{n: old[n] for n in new if ".layers.1." in n}}
    swapped = {n: new[n.replace(".layers.0.", ".layers.1.")] for n in new}
    for wrong in (old, layer, swapped):
        assert not both.gap(pair, new, wrong).within(bound)


def test_not_a_number_is_within_nothing() -> None:
    said = np.array([-1.0, np.nan], dtype=np.float32)
    assert not Gap.of(said, np.zeros(2, dtype=np.float32)).within(Gap(mean=9.0, high=9.0, greatest=float(np.inf)))


@pytest.mark.parametrize(
    "bound", [Gap(mean=0.0, high=0.0, greatest=0.0), Gap(mean=0.5, high=1.0, greatest=2.0)], ids=str
)
def test_a_gap_at_its_bound_is_within_and_one_beyond_in_any_number_is_not(bound: Gap) -> None:
    assert bound.within(bound)
    for name in ("mean", "high", "greatest"):
        at = getattr(bound, name)
        assert not replace(bound, **{name: float(np.nextafter(at, np.inf))}).within(bound)
        assert replace(bound, **{name: float(np.nextafter(at, -np.inf))}).within(bound)


@pytest.mark.parametrize(
    ("tokens", "longest", "expected"), [(5, 99, SHORTEST), (50, 99, 50), (500, 999, LONGEST), (50, 20, 19)]
)
def test_the_text_is_the_first_prompt_and_fits_the_engine(tokens: int, longest: int, expected: int) -> None:
    prompt = list(range(tokens))
    ids = text(prompt, 600, longest)
    assert len(ids) == expected and ids[: min(tokens, expected)].tolist() == prompt[:expected]
    assert np.array_equal(ids, text(prompt, 600, longest)) and int(text([1], 7, 99).max()) < 7


@pytest.mark.parametrize(
    ("coarse", "least", "differs"),
    [(False, Gap(mean=3e-5, high=1e-4, greatest=1e-3), 0.02), (True, Gap(mean=0.03, high=0.1, greatest=0.5), 0.25)],
)
def test_what_is_allowed_grows_with_what_was_measured_and_never_below_rounding(
    coarse: bool, least: Gap, differs: float
) -> None:
    """Each of the three numbers by itself; the figures are those of docs/lora.md."""
    assert allowed(Gap(mean=0.0, high=0.0, greatest=0.0), coarse=coarse) == least
    for name in ("mean", "high", "greatest"):
        floor = Gap(**{"mean": 0.0, "high": 0.0, "greatest": 0.0, name: 7.0})
        assert allowed(floor, coarse=coarse) == replace(least, **{name: 7.0 * TIMES})
    assert NUMERICS[coarse] == differs > least.mean


def test_one_token_of_a_right_version_that_a_run_was_ended_for() -> None:
    """Measured: 31 tokens, float32, the 40th update of a student that learns at twice the usual rate (docs/log.md)."""
    bound = allowed(Gap(mean=2e-6, high=4e-6, greatest=6e-6), coarse=False)
    assert Gap(mean=6.3e-6, high=7.6e-6, greatest=1.2e-4).within(bound)


@pytest.mark.parametrize("coarse", [False, True])
def test_one_token_of_a_mixture_of_experts_says_nothing_in_bfloat16(coarse: bool) -> None:
    floor = Gap(mean=0.0, high=0.0, greatest=0.0)
    whole = allowed(floor, coarse=coarse)
    assert allowed(floor, coarse=coarse, experts=True) == (replace(whole, greatest=np.inf) if coarse else whole)
