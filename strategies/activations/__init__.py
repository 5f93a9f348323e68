"""Parts of layers that keep less for their backward: activation functions a few bits, norms what others keep anyway."""
