"""Reading of a refusal: for every property that does not hold, where to look."""

from collections.abc import Mapping

from opd.certify.certificate import Certificate

FORMULA = (
    "gradient of the promise",
    "the loss does not descend what the objective's `promise` says, in the plainest world: compare its formula, sign "
    "and stop-gradients with the promise; if `credit` or `targets` fails too, begin with the scorer",
)
STALE = "gradient of the promise, stale writer"
WHERE: Mapping[str, str] = {
    STALE: "the importance ratio, which is the current student over the writer",
    "gradient of the promise, writer far away": "the importance ratio is clamped, cast or left out",
    "gradient of the promise, long prompts": "something depends on how long a text or its prompt is",
    "gradient of the promise, 256 ids": "with many ids, most of them unlikely: a support that is not as large as "
    "its `k` says, a clamp, or a small number added to a probability",
    "gradient of the promise, teacher far away": "a log-ratio is clamped or cast, or a small number added to a "
    "probability",
    "gradient of the promise, teacher farther away": "something ends at a large log-ratio: a clamp, a mask, a detach",
    "gradient of the promise, teacher nearly reached": "something ends at a small log-ratio: a mask, a cast",
    "gradient of the promise, both nearly certain": "something ends where a probability is nearly 1: a mask, a clamp, "
    "a small number added to a probability",
    "gradient of the promise, temperature": "log-probabilities are not those at the temperature of sampling",
    "gradient of the promise, student a step later": "the objective keeps what an earlier student gave to the same "
    "text; what must be the current one's is `student`",
    "gradient of the promise, middle of a run": "a part reads `context.step`, and goes wrong as steps go on",
    "gradient of the promise, end of a run": "a part reads `context.step`, and goes wrong as steps go on",
    "gradient of the promise, texts that the token limit cut": "a part reads `Trajectory.stop`, or should",
    "gradient of the promise, float32": "cancellation, a clamp or a cast in the precision of a learner",
    "gradient of the promise, bfloat16": "a cast, or a comparison of rounded numbers",
    "gradient of the promise, several teachers": "an index over teachers, or how several are mixed: their shares, and "
    "whether probabilities or log-probabilities are added",
    "gradient of the promise, other settings": "two fields of the objective are exchanged, or one is not used",
    "the promise has a gradient": "next to nothing would be trained: a weight, a factor, or a support of one id",
    "the support does not depend": "the scorer, or what the rollout records, has the ids of another token's state, or "
    "chooses them by the token that was sampled",
    "a support has": "the scorer, or what the rollout records, has fewer ids than its `k`, or others than the "
    "likeliest",
    "a target moves": "targets stand at another token than the one at which the teacher was read, or ids and "
    "probabilities are in another order",
    "tokens are trained": "all weights are 0: a mask, a filter, or a weight",
    "limit: k = V": "with every id in the support something is still left out, or `k` is not used",
    "limit:": "the special case that a part lists in `limits` is not what it says",
    "the teacher matters": "the gradient ignores what the teacher says",
    "zero where the student equals": "this is no divergence: an equal is pushed away from",
    "a shifted teacher is noticed": "scores are matched with other tokens than their own",
    "a step moves the student towards": "the sign, or nothing moves it",
    "a promise without a teacher": "the gradient follows a teacher that the promise does not name",
    "invariance: order of the teachers": "an index over teachers",
    "invariance: evaluated before": "the objective keeps something between calls, writes into its batch, or draws at "
    "random",
    "invariance: position": "the loss of a token reads where it stands (`depth`, `position_ids`)",
    "invariance: weight and divisor": "the objective applies weights or the divisor, which the learner does",
    "invariance: scale of the weights": "the objective applies weights, which the learner does",
    "invariance: ids of probability 0": "a mean over the vocabulary, or a number that depends on its size",
    "invariance: ids under other numbers": "the loss reads the numbers of ids: a slice of the vocabulary, a bound, "
    "one id",
    "invariance:": "the loss of a token reads other tokens of its batch (a mean, a maximum, a shape), or draws by its "
    "place there; statistics of a step belong in a token weight, and tokens that an objective draws itself in "
    "`draw` and `given`",
    "some term has": "every coefficient is below 0 at some step: the student is trained away from all that is promised",
    "the sum has a part": "a term adds nothing: its coefficient, its weights or its scores",
    "gradient of the sum": "each term may be right, and their sum is not: coefficients, divisors, scores of terms",
    "sum, invariance:": "the loss of a token reads other tokens of its batch",
    "masked tokens give zero": "the loss reads tokens of weight 0",
    "a token counts": "the normalizer has another divisor than the one that it is derived from, or another "
    "`per_sequence`, by which every text is divided by its own length",
    "the divisor of a step": "the normalizer counts something else than what is trained",
    "credit is what": "the scorer's numbers: sign, order, discount, group, a setting that is not used, or tokens of "
    "context (`loss_mask` False) that are counted",
    "the better of two answers": "the sign or the order of advantages",
    "the last return": "returns are shifted by a token, or begin with the token's own reward",
    "a return falls": "returns look backwards, or at too few tokens",
    "credit makes": "the sign of the credit in the objective",
    "distances of near futures": "which tokens are candidates, where windows start, or whose window is whose",
    "targets are": "windows, their start, or how labels are aligned",
    "teachers are asked": "a request to a teacher is missing, or has another context or other tokens than the text's",
    "text is written": "a request of the rollout has another context, temperature, top_p, max_tokens, blend or number "
    "of recorded ids than it is set to, at this step or a later one",
    "text is trained whole": "the rollout cuts or masks tokens of a text, or leaves an answer without its end (one "
    "that leaves out whole texts needs `everything`: the same with nothing left out)",
    "a text is recorded": "the rollout changes a text's prompt, log-probabilities, recorded top-k, versions (-1 "
    "where no policy of the run wrote), digests or end, or mixes up groups that are written at once",
    "a coin falls": "the coin is flipped with another chance than `fraction`, or not anew for every prompt",
    "an answer that was cut": "the scorer pays for a text that the token limit cut",
    "a text without tokens": "a mean over no token",
    "texts are left out": "the filter keeps others than its thresholds say, by the rewards of the grader",
    "scores follow": "the scorer depends on the order of a group or on numbers of texts, keeps something between "
    "calls or while it waits, writes into a text, or draws at random",
    "scores are numbers": "division by 0, or an empty mean: a text that is alone or has one token, or equal texts",
    "scores of a text do not": "the scorer compares texts of a group and declares no `min_group` above 1: a mean, a "
    "maximum, the longest text",
    "scores do not depend": "the scorer reads `behavior` where `loss_mask` is False, as at an environment's words, or "
    "does not put back at their tokens the numbers of those that are sampled",
    "scores, weights and losses are": "a part reads single steps, its process, versions of the writer or later tokens, "
    "or keeps scores by the text alone",
    "texts are written anew": "the rollout keeps texts, draws from the random state of the process, treats a lone "
    "prompt otherwise, or its `everything` is another rollout than the one that runs",
    "weights follow": "a weight depends on the order of a step, keeps something, changes its input, or draws at random",
    "weights are numbers": "division by 0, or a narrow float: one text, one token, equal or extreme readings",
    "weights do not depend": "a weight reads scores where `loss_mask` is False, as at an environment's words",
    "weights stand at": "weights are shifted: that of a token is made of the one before or after it",
    "weights are what": "the wrong end, a wrong count or a wrong mean, beside the weight that the part is derived from",
    "readings are what": "the reading is not what the one that it is derived from is: whose entropy, which direction",
    "readings are": "a reading uses other tokens of its batch, that is of a micro-batch; let the weight do that",
    "what the teacher is shown of a text": "a builder that needs no group (`min_group` 1) reads the other texts: whose "
    "draft is shown to whom",
    "what the teacher is shown of other texts": "a context shows a text that did not succeed",
    "what the teacher is shown": "a context is built from the text that the teacher scores in it",
    "draws": "the tokens that the objective draws",
    "the loss is that of the draws": "`given` and `__call__` differ",
    "schedules have": "the way between first and last is another than that of the schedule it is derived from: a "
    "length that is not used, an end too early, a step counted twice",
    "schedules begin": "first and last are exchanged, or steps are counted from 1",
    "an update takes": "the update makes no step, several, or one on a part of the batch",
    "updates bring": "steps are taken back, or weights are moved against the step",
    "an update keeps": "what must outlast a step is a snapshot of the learner or follows from `context.step`; the part "
    "itself keeps nothing",
    "an update ends": "the snapshot from which it measures, the steps at which it acts, or what is restored",
}


def where_to_look(certificate: Certificate) -> dict[str, str]:
    """A sentence for every property that fails; of gradients, for the plainest of those that fail alone.

    Plainer than corners is the stale writer, which all corners have whose text the student writes.
    """
    said: dict[str, str] = {}
    for row in (row for row in certificate.rows if not row.passed):
        of = next((term for term in _terms(row.name)), "")
        bare = row.name.removeprefix(of)
        plainer = [FORMULA[0], STALE][: 1 + (bare != STALE)] if bare.startswith(f"{FORMULA[0]},") else []
        if any(of + name in certificate.failures for name in plainer):
            continue
        text = (
            FORMULA[1] if bare == FORMULA[0] else next((t for start, t in WHERE.items() if bare.startswith(start)), "")
        )
        said[row.name] = "; ".join(part for part in (row.note, text) if part)
    return {name: text for name, text in said.items() if text}


def _terms(name: str) -> list[str]:
    """The term before a property of a sum. Example: `futures: the teacher matters`."""
    term, colon, _ = name.partition(": ")
    return [term + colon] if colon and term not in ("invariance", "limit", "sum, invariance") else []
