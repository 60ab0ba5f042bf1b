"""What users of LangChain's image tool do. Prints what came of it as JSON."""

from __future__ import annotations

import json
import os

import httpx
from langchain_community.tools.openai_dalle_image_generation import OpenAIDALLEImageGenerationTool
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper


def main() -> dict[str, object]:
    wrapper = DallEAPIWrapper(
        base_url=os.environ["URL"], api_key="unused", size="64x64", n=2, quality="standard"
    )
    links = wrapper.run("cat").split("\n")
    tool = OpenAIDALLEImageGenerationTool(api_wrapper=wrapper)
    [one, _] = tool.invoke("cat").split("\n")
    kinds = [httpx.get(link, trust_env=False).headers["content-type"] for link in (*links, one)]
    return {"kinds": kinds, "model": wrapper.model_name}


print(json.dumps(main()))
