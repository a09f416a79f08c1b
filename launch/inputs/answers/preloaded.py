"""Imports of a grading process, made before its first request; nothing else imports this."""

import latex2sympy2_extended.latex2sympy2
import math_verify
import sympy

__all__ = ["latex2sympy2_extended", "math_verify", "sympy"]
