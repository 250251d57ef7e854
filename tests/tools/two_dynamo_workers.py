"""Starts Dynamo's frontend and two of scripts/dynamo_worker.py, asks what their test wants to know; prints JSON.

python tests/tools/two_dynamo_workers.py PORT      # in a network of its own, see tests/serving/loopback.py
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

ROOT = Path(__file__).parents[2]
ASK = {"model": "mimo-tiny", "prompt": "def add(a, b):", "temperature": 0, "max_tokens": 24}
LONG = {**ASK, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
MOST_SECONDS = 60
PEACE = 1.0  # seconds: a frontend hears of a worker's end a little later


def main(port: str) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as processes:
        os.environ |= {"DYN_FILE_KV": folder, "HF_HUB_OFFLINE": "1"}

        def start(*command) -> subprocess.Popen:
            process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
            processes.callback(process.kill)
            return process

        frontend = ["--http-host", "127.0.0.1", "--http-port", port, "--discovery-backend", "file"]
        start("-m", "dynamo.frontend", *frontend)
        workers = [start(ROOT / "scripts" / "dynamo_worker.py") for _ in range(2)]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=9, timeout=30)
        print(json.dumps(seen(client, workers, Path(folder))))


def seen(client: openai.OpenAI, workers: list[subprocess.Popen], folder: Path) -> dict:
    wait_for(lambda: len(instances(folder)) == 2 and served(client))
    found = {"prompt": ASK["prompt"], "model": served(client)}
    reply = client.completions.create(**ASK)
    found["text"], found["tokens"] = reply.choices[0].text, reply.usage.completion_tokens
    chunks = list(client.completions.create(**LONG, stream=True))
    found["pieces"] = sum(bool(chunk.choices and chunk.choices[0].text) for chunk in chunks)
    message = {"role": "user", "content": "def fib(n):"}
    chat = client.chat.completions.create(model="mimo-tiny", messages=[message], max_tokens=8, temperature=0)
    found["chat"] = chat.choices[0].message.content
    found["refusals"] = [refusal(client, {"prompt": "x " * 1200}), refusal(client, {"n": 2, "temperature": 1})]

    workers[0].send_signal(signal.SIGTERM)
    found["exit_code"] = workers[0].wait(MOST_SECONDS)
    wait_for(lambda: len(instances(folder)) == 1)
    time.sleep(PEACE)
    found["text_of_the_other"] = client.completions.create(**ASK).choices[0].text
    return found


def refusal(client: openai.OpenAI, change: dict) -> str:
    try:
        client.completions.create(**{**ASK, **change})
    except openai.BadRequestError as error:
        return error.response.json()["message"]
    return "none"


def served(client: openai.OpenAI) -> str | None:
    with contextlib.suppress(openai.APIConnectionError):
        return next((model.id for model in client.models.list().data), None)


def instances(folder: Path) -> list[Path]:
    """Workers that have said that they are there."""
    return [*(folder / "v1" / "instances").glob("*generate*")]


def wait_for(holds) -> None:
    end = time.monotonic() + MOST_SECONDS
    while not holds():
        if time.monotonic() > end:
            raise SystemExit("waited in vain for the workers")
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1])
