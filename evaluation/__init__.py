"""Reconstructions compared with the truth: the only room that holds both.

metrics: how far one example is from another. pairing: which reconstruction belongs to which true example. baselines:
what public data alone would score. bounds: oracles, computed with the truth. evaluator: the rows of one trial.
summary: the numbers of a run.
"""
