"""Which scheme each linear takes on one kind of hardware: measured, chosen, and kept as a plan."""

from quantcore.autoquant.inplace import Autoquant, autoquant
from quantcore.autoquant.swapping import relay, restore

__all__ = ["Autoquant", "autoquant", "relay", "restore"]
