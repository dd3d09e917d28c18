"""The data sets that `esper train` and `esper evaluate` know. Nothing is downloaded.

Every set has three parts: train; holdout, on which decisions about growth are made; and
eval, on which nothing is decided and from which reports take their figures. The splits are
the same for every seed of a run, so that runs can be compared.
"""
