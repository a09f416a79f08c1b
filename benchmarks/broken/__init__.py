"""Methods that are wrong on purpose: each is published, shipped somewhere, or easily written.

They exist to show that `opd certify` can fail, and what training with them looks like. They are no part of the
package; use them as parts of your own, and `train experiment=shop` instead of `certify` to see one fail:

    PYTHONPATH=benchmarks opd certify conf=benchmarks/broken/conf 'allow_targets=[broken.]' method=direct_k1
"""
