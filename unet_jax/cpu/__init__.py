"""What is for the CPU's speed alone: `layers` with the names of `unet_jax.layers`, and the memory of a process."""
