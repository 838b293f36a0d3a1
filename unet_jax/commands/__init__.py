"""The commands, a module each: `python -m unet_jax NAME`, or the script in experiments/ that has the same flags."""
