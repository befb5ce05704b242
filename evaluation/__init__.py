"""Scores of reconstructions against the truth. No attack, model or defence sees the truth.

metrics: how far one example is from another. pairing: which reconstruction belongs to which true example. baselines:
what public data alone would score. bounds: oracles, computed with the truth. evaluator: the rows of one trial.
summary: the numbers of a run.
"""
