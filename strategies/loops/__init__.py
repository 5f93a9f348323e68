"""Other people's loops: strategies under their forward, their loss and their `backward`."""
