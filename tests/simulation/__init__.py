"""A pool in small, real but for its engines, in which everything fails; and an oracle that knows what is to be charged.

`plan` draws a schedule from a seed, `world` is the pool, `run` lets the schedule happen in it, `oracle` judges. One seed
again: `python -m tests.simulation --seed N`.
"""
