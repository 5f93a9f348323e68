"""How work is spread over devices and survives: topology, engines, checkpoints, meters, the loop."""
