"""Reading of a refusal: for every property that does not hold, where to look."""

from collections.abc import Mapping

from opd.certify.certificate import Certificate

FORMULA = (
    "gradient of the promise",
    "the loss does not descend what the objective's `promise` says, in the plainest world: compare its formula, sign "
    "and stop-gradients with the promise; if `credit` or `targets` fails too, begin with the scorer",
)
WHERE: Mapping[str, str] = {
    "gradient of the promise, stale writer": "the importance ratio, which is the current student over the writer",
    "gradient of the promise, writer far away": "the importance ratio is clamped, cast or left out",
    "gradient of the promise, long prompts": "something depends on how long a text or its prompt is",
    "gradient of the promise, 256 ids": "a support is not as large as its `k` says",
    "gradient of the promise, teacher far away": "a log-ratio is clamped or cast",
    "gradient of the promise, temperature": "log-probabilities are not those at the temperature of sampling",
    "gradient of the promise, middle of a run": "a part reads `context.step`, and goes wrong as steps go on",
    "gradient of the promise, end of a run": "a part reads `context.step`, and goes wrong as steps go on",
    "gradient of the promise, texts that the token limit cut": "a part reads `Trajectory.stop`, or should",
    "gradient of the promise, float32": "cancellation, a clamp or a cast in the precision of a learner",
    "gradient of the promise, bfloat16": "a cast, or a comparison of rounded numbers",
    "gradient of the promise, several teachers": "an index over teachers",
    "gradient of the promise, other settings": "two fields of the objective are exchanged, or one is not used",
    "the promise has a gradient": "next to nothing would be trained: a weight, a factor, or a support of one id",
    "the support does not depend": "the scorer chooses ids by the token that was sampled",
    "tokens are trained": "all weights are 0: a mask, a filter, or a weight",
    "limit:": "the special case that a part lists in `limits` is not what it says",
    "the teacher matters": "the gradient ignores what the teacher says",
    "zero where the student equals": "this is no divergence: an equal is pushed away from",
    "a shifted teacher is noticed": "scores are matched with other tokens than their own",
    "a step moves the student towards": "the sign",
    "a promise without a teacher": "the gradient follows a teacher that the promise does not name",
    "invariance: order of the teachers": "an index over teachers",
    "invariance: evaluated before": "the objective keeps something between calls, or draws at random",
    "invariance: position": "the loss of a token reads where it stands (`depth`, `position_ids`)",
    "invariance: weight and divisor": "the objective applies weights or the divisor, which the learner does",
    "invariance: scale of the weights": "the objective applies weights, which the learner does",
    "invariance:": "the loss of a token reads other tokens of its batch (a mean, a maximum, a shape); statistics of a "
    "step belong in a token weight",
    "the sum has a part": "a term adds nothing: its coefficient, its weights or its scores",
    "gradient of the sum": "each term may be right, and their sum is not: coefficients, divisors, scores of terms",
    "sum, invariance:": "the loss of a token reads other tokens of its batch",
    "masked tokens give zero": "the loss reads tokens of weight 0",
    "the divisor of a step": "the normalizer counts something else than what is trained",
    "credit is what": "the scorer's numbers: sign, order, discount, group, or a setting that is not used",
    "the better of two answers": "the sign or the order of advantages",
    "the last return": "returns are shifted by a token, or begin with the token's own reward",
    "a return falls": "returns look backwards, or at too few tokens",
    "credit makes": "the sign of the credit in the objective",
    "distances of near futures": "which tokens are candidates, where windows start, or whose window is whose",
    "targets are": "windows, their start, or how labels are aligned",
    "teachers are asked": "a request to a teacher is missing, or has another context or other tokens than the text's",
    "text is written": "a request of the rollout has another context, temperature, top_p, max_tokens or blend than it "
    "is set to, at this step or a later one",
    "text is trained whole": "the rollout cuts or masks tokens of a text (one that leaves out whole texts needs "
    "`everything`: the same with nothing left out)",
    "a text is recorded": "the rollout changes a text's prompt, log-probabilities, versions (-1 where no policy of the "
    "run wrote), digests or end",
    "an answer that was cut": "the scorer pays for a text that the token limit cut",
    "a text without tokens": "a mean over no token",
    "texts are left out": "the filter keeps others than its thresholds say, by the rewards of the grader",
    "scores follow": "the scorer depends on the order of a group, keeps something, or draws at random",
    "scores are numbers": "division by 0, or an empty mean: a text that is alone or has one token, or equal texts",
    "scores of a text do not": "the scorer compares texts of a group and declares no `min_group` above 1: a mean, a "
    "maximum, the longest text",
    "scores do not depend": "the scorer reads `behavior` where `loss_mask` is False, as at an environment's words",
    "weights follow": "a weight depends on the order of a step, keeps something, changes its input, or draws at random",
    "weights are numbers": "division by 0, or a narrow float: one text, one token, equal or extreme readings",
    "weights do not depend": "a weight reads scores where `loss_mask` is False, as at an environment's words",
    "weights stand at": "weights are shifted: that of a token is made of the one before or after it",
    "weights are what": "the wrong end, a wrong count or a wrong mean, beside the weight that the part is derived from",
    "readings are": "a reading uses other tokens of its batch, that is of a micro-batch; let the weight do that",
    "what the teacher is shown of other texts": "a context shows a text that did not succeed",
    "what the teacher is shown": "a context is built from the text that the teacher scores in it",
    "draws": "the tokens that the objective draws",
    "the loss is that of the draws": "`given` and `__call__` differ",
    "schedules": "first and last are exchanged, or steps are counted from 1",
    "an update takes": "the update makes no step, several, or one on a part of the batch",
    "an update keeps": "what must outlast a step is a snapshot of the learner or follows from `context.step`; the part "
    "itself keeps nothing",
    "an update ends": "the snapshot from which it measures, the steps at which it acts, or what is restored",
}


def where_to_look(certificate: Certificate) -> dict[str, str]:
    """A sentence for every property that fails; of gradients, where the plainest fails, for that one alone."""
    said: dict[str, str] = {}
    for name in certificate.failures:
        of = next((term for term in _terms(name)), "")
        bare = name.removeprefix(of)
        if bare == FORMULA[0]:
            said[name] = FORMULA[1]
        elif not (bare.startswith(f"{FORMULA[0]},") and of + FORMULA[0] in certificate.failures):
            said[name] = next((text for start, text in WHERE.items() if bare.startswith(start)), "")
    return {name: text for name, text in said.items() if text}


def _terms(name: str) -> list[str]:
    """The term before a property of a sum. Example: `futures: the teacher matters`."""
    term, colon, _ = name.partition(": ")
    return [term + colon] if colon and term not in ("invariance", "limit", "sum, invariance") else []
