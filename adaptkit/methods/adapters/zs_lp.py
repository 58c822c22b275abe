"""ZS-LP: a linear probe whose class weights start at the text features, trained by cross-entropy alone.

Source: arXiv 2312.12730, Sec. 3; clap sheet; reference code jusiro/CLAP, trainers/adapters.py (INIT ZS, no constraint).
Differs from the reference: what is trained and kept is the difference from the text features (the same numbers).
"""

from __future__ import annotations

from adaptkit.methods import methods
from adaptkit.methods.adapters._residual import PrototypeMethod


@methods.register("zs-lp")
class ZSLP(PrototypeMethod):
    """Class weights that start at the unnormalised text features; unseen classes keep theirs."""

    name = "zs-lp"
