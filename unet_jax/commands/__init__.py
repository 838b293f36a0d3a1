"""The commands, a module each. `python -m unet_jax NAME` and the script in experiments/ take the same flags."""
