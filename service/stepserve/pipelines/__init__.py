"""The only room that knows diffusers: load pipelines, attach them to the engine, make images."""

import os

# Read when transformers is imported: it would warn every user that torchvision is missing.
os.environ["TRANSFORMERS_VERBOSITY"] = os.environ.get("TRANSFORMERS_VERBOSITY") or "error"
# An empty one would have torch run compiled code from the current folder.
if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
