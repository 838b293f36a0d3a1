"""Builds the API reference of the docstrings as web pages: `python docs/api.py`, with the extra `docs`."""

import pkgutil
from pathlib import Path

import pdoc

import unet_jax

OUT = Path(__file__).parents[1] / "build" / "api"

# pdoc shows what a module's dictionary has, and of modules those in __all__: ours are imported when they are asked for.
vars(unet_jax).update({name: getattr(unet_jax, name) for name in unet_jax.__all__})
unet_jax.__all__ += [module.name for module in pkgutil.iter_modules(unet_jax.__path__) if module.name != "__main__"]
pdoc.render.configure(docformat="google", show_source=False)
pdoc.pdoc("unet_jax", output_directory=OUT)
print(f"the first page is {OUT / 'unet_jax.html'}")
