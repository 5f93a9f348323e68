"""From a recipe's data sets to the micro-batches of a rank."""

from launch.data.data import Data, open_data
from launch.data.show import show

__all__ = ["Data", "open_data", "show"]
