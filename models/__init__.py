"""Models written in Flax nnx, with real weights: what jax_mpk is demonstrated and tested on."""
