"""Scores of reconstructions against the truth. No attack, model or defence sees the truth.

metrics: how far one example is from another. pairing: which reconstruction belongs to which true example. baselines:
what public data alone would score. candidates: examples that nobody sent. identification: the rank of a victim among
them. bounds: oracles, computed with the truth. objective: how well the truth explains an update, and the status of an
attack. evaluator: the rows of one trial. intervals: 95% intervals over independent units. summary: the numbers of a
run. verdict: whether the update leaks.
"""
