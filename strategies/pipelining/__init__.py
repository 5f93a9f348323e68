"""The parts of `twobp`: which rank has which layers, what a stage runs, and weight gradients that wait."""
