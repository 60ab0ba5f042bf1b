"""FastAPI and diffusers, the way diffusers' own page "Create a server" shows.

    PEER_PORT=8100 python -m loadtests.peers.fastapi_server

A thread pool makes the images, so that the event loop goes on. With PEER_WORKERS=1 requests are
made one at a time, as behind a lock; with more, calls run side by side and share the cores.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from loadtests.peers.common import PATH, ImageRequest, PeerSettings, load_pipeline, make_answers

settings = PeerSettings.read()
pipeline = load_pipeline(settings)
app = FastAPI()
# Each thread that runs torch gets OpenMP threads of its own, as many as are set in it.
pool = ThreadPoolExecutor(
    settings.workers, initializer=torch.set_num_threads, initargs=(settings.threads,)
)


@app.post(PATH)
async def generate(request: ImageRequest) -> dict[str, Any]:
    """Make the images of one request."""
    loop = asyncio.get_running_loop()
    (answer,) = await loop.run_in_executor(pool, make_answers, pipeline, [request])
    return answer


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=settings.port, access_log=False, log_level="warning")
