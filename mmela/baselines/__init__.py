"""Modules that the papers' tables compare layer attention with."""

from . import plugins
from .augmented_conv import AA
from .ba import BA
from .branch import BranchAttention, Plugin
from .dia import DIA
from .rla_g import RLAg

__all__ = ['AA', 'BA', 'BranchAttention', 'DIA', 'Plugin', 'RLAg', 'plugins']
