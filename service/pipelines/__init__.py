"""The only room that knows diffusers: load pipelines, attach them to the engine, make pictures."""

import os

# Read when transformers is imported: it would tell every user that torchvision is missing.
os.environ["TRANSFORMERS_VERBOSITY"] = os.environ.get("TRANSFORMERS_VERBOSITY") or "error"
