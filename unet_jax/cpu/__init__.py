"""Code for speed on the CPU only: `layers`, with the names of `unet_jax.layers`, and the memory of a process."""
