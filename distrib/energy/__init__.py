"""What a run costs in joules: a `Meter` reads the devices, an `Account` says what a window took, how surely."""

from distrib.energy.account import Account, Part, summed
from distrib.energy.meter import Meter, Reading

__all__ = ["Account", "Meter", "Part", "Reading", "summed"]
