"""What each word of the table means: its formula, in row vectors as everywhere (o = q M), and its place in the picture.

A decay's formula is what becomes of M, an update's what is written to it; a word of rows with two memories says in
`second` what becomes of the other one, N. M_{t-1}, M_t and N_t are those before and after the token; k, v, beta and
the other inputs are the token's own. Formulas are LaTeX that matplotlib and GitHub both read, without |.
"""

from typing import NamedTuple


class Word(NamedTuple):
    group: str  # the column of the picture where a decay stands, the lane of an update
    formula: str
    about: str
    second: str = ""


KEEPS, HEAD, CHANNEL = "keeps", "by head", "by key channel"
ELEMENT, COMPLEX, STAGES = "by element", "turns", "in stages"
ADDS, FILLS, CORRECTS, DESCENDS = "adds", "fills what faded", "corrects", "follows a gradient"

DECAYS = {
    "keep": Word(KEEPS, r"M", "nothing fades"),
    "fixed": Word(HEAD, r"e^{g_h} M", "a rate for each head"),
    "scalar": Word(HEAD, r"e^{g_t} M", "a rate for each head and token"),
    "timed": Word(HEAD, r"e^{A \beta} M", "a rate for each head, times what the token writes with"),
    "channel": Word(CHANNEL, r"\mathrm{diag}(e^{g_t}) \, M", "a rate for each key channel and token"),
    "cross": Word(
        ELEMENT,
        r"\mathrm{diag}(e^{g_t}) \, M \, \mathrm{diag}(e^{f_t})",
        "a rate for each key channel, times one for each value channel",
    ),
    "element": Word(
        ELEMENT,
        r"e^{A \, \mathrm{diag}(\Delta_t)} \odot M",
        "a rate for each element, times a step for each value channel and token",
    ),
    "erased": Word(
        ELEMENT,
        r"(1 - (k \odot k)^T \Delta_t) \odot M",
        "the key's square times a step for each value channel is erased",
    ),
    "stepped": Word(
        ELEMENT,
        r"e^{\mathrm{diag}(\Delta_t) \, A} \odot M",
        "a rate for each element, times a step for each key channel and token",
    ),
    "full": Word(ELEMENT, r"e^{G_t} \odot M", "a rate for each element and token"),
    "rotating": Word(
        COMPLEX, r"\mathrm{diag}(e^{g_t + i \theta_t}) \, M", "each key channel fades and turns, at rates of the token"
    ),
    "spiral": Word(COMPLEX, r"e^{g + i \theta} \odot M", "each element fades and turns, at rates of its own"),
    "slowing": Word(STAGES, r"e^{g_t} M", "the memory fades, and so does its momentum N", r"e^{f_t} N"),
    "restart": Word(
        STAGES,
        r"M",
        "N is the memory as it was when a mini-batch began (b is 1 there, else 0)",
        r"b_t M + (1 - b_t) N",
    ),
    "commit": Word(
        STAGES,
        r"M - b_t \eta N",
        "when a mini-batch begins (b is 1 there, else 0), the gradients N go into the weights M",
        r"(1 - b_t) N",
    ),
    "merging": Word(
        STAGES,
        r"e^{g_t} U_t M",
        "memories of 1, 2, 4, … tokens stand above each other; U moves those that are full up, and all fade",
    ),
}
UPDATES = {
    "outer": Word(ADDS, r"M + k^T v", "add"),
    "counted": Word(ADDS, r"M + k^T [v \; 1]", "add, and count"),
    "real": Word(ADDS, r"M + k^T v", "add a real key to a complex memory"),
    "level": Word(ADDS, r"M + \mathbf{1}^T v", "add the value to every row"),
    "lowest": Word(ADDS, r"M + [k \; 0]^T v", "add to the lowest memory alone"),
    "paired": Word(ADDS, r"M + \beta k^T [k \; v]", "add keys with keys, beside keys with values"),
    "weighed": Word(ADDS, r"M + \beta k^T v", "add with a strength"),
    "paced": Word(ADDS, r"M + (\Delta_t \odot k)^T v", "add with a step for each key channel"),
    "tied": Word(FILLS, r"M + (1 - e^{g_t})^T v", "what faded makes room for what is written"),
    "slots": Word(FILLS, r"M + (1 - e^{g_t})^T [k \; v]", "the same, with keys and values side by side in every slot"),
    "delta": Word(CORRECTS, r"M + \beta k^T (v - k M)", "write the difference to what the key finds"),
    "foresight": Word(CORRECTS, r"M + \beta k^T (v - a M_{t-1})", "the difference to what another key found before"),
    "replace": Word(CORRECTS, r"M + b^T a M_{t-1} + k^T v", "what one key found before moves to another; then add"),
    "independent": Word(
        CORRECTS,
        r"M + k^T (\beta v - \alpha k M)",
        "erase with one strength (α is 1 if there is none), write with another",
    ),
    "momentum": Word(
        DESCENDS,
        r"M + N_t",
        "the memory follows a momentum N, which follows the gradient of the squared error",
        r"N + 2 \beta k^T (v - k M_{t-1})",
    ),
    "gradient": Word(
        DESCENDS, r"M + \beta k^T (v - k N_t)", "the delta rule, its difference taken where the mini-batch began", r"N"
    ),
    "inner": Word(
        DESCENDS,
        r"M",
        "gradients of the squared error of LN(z) against v - k, taken where the mini-batch began",
        r"N + \beta [k \; 1]^T \nabla\ell([k \; 1] (W + M_t))",
    ),
    "ascent": Word(DESCENDS, r"M + \beta k^T (k M_{t-1} - v)", "up the gradient of the squared error"),
}
READS = {
    "inclusive": Word("", r"q M_t", "what the query finds"),
    "ratio": Word("", r"y / n, \; [y \; n] = q M_t", "divided by the count"),
    "damped": Word("", r"y / (n + 10^{-5}), \; [y \; n] = q M_t", "divided by a count that may be close to zero"),
    "bonus": Word("", r"q (M_{t-1} + (u \odot k)^T v)", "before the token is written, which has a weight of its own"),
    "above": Word("", r"q \, \mathrm{Re} \, M_t", "the first of two memories, or the real part"),
    "real_part": Word(
        "", r"2 \, \mathrm{Re} \, \mathbf{1} \, ((q + i p) \odot M_t)", "a complex query for each value channel"
    ),
    "attended": Word("", r"\mathrm{softmax}(q K^T) \, V, \; [K \; V] = M_t", "softmax attention over slots"),
    "solved": Word("", r"q (G + \Lambda)^{-1} Y, \; [G \; Y] = M_t", "the least squares that the writes ask for"),
    "by_level": Word("", r"\sum_\ell \lambda_\ell \, q M_t^{(\ell)}", "each memory with its weight"),
    "inner_read": Word("", r"q + \mathrm{LN}([q \; 1] (W + M_t - r N_t))", "the inner model's answer to the query"),
}
FEATURES = {
    "taylor": Word(
        "", r"\varphi(q) \varphi(k)^T = 1 + s + s^2 / 2, \; s = q k^T / \sqrt{d}", "e^s to the second order"
    ),
    "squares": Word("", r"\varphi(q) \varphi(k)^T = (q k^T)^2 / d", "the square of the product"),
}
MEANING = {
    name: word._replace(**{f: getattr(word, f).replace("^T", r"^{\mathrm{T}}") for f in ("formula", "second")})
    for name, word in (DECAYS | UPDATES | READS | FEATURES).items()
}


def meaning(name: str) -> Word:
    """The word's entry; a word that has none yet is a group of its own, by its name."""
    return MEANING.get(name, Word(name, "", ""))
