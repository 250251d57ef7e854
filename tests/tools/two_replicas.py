"""Starts scripts/serve_replicas.py, asks it what its test wants to know, ends it; prints one line of JSON.

python tests/tools/two_replicas.py PORT      # in a network of its own, see tests/serving/loopback.py
"""

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
ACCOUNTS = ("ann", "bob", "cem", "dee")
ASK = {"model": "mimo-tiny", "prompt": "def add(a, b):\n" + "    # one more line\n" * 40, "temperature": 0}
LONG = {**ASK, "max_tokens": 700, "extra_body": {"ignore_eos": True}}
MOST_SECONDS = 60


def main(port: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text("".join(f"{account} key-of-{account}\n" for account in ACCOUNTS))
        options = ["--replicas", "2", "--cpus", "0.1", "--sticky-header", "authorization", "--api-key-file", keys]
        command = [sys.executable, ROOT / "scripts" / "serve_replicas.py", "--port", port, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                print(json.dumps(seen(server, f"http://127.0.0.1:{port}/v1")))
            finally:
                server.terminate()


def seen(server: subprocess.Popen, url: str) -> dict:
    first = server.stdout.readline()
    clients = [openai.OpenAI(base_url=url, api_key=f"key-of-{account}", max_retries=9) for account in ACCOUNTS]
    found = {"first_line": first, "prompt": ASK["prompt"], "replicas": len(replicas())}
    try:
        openai.OpenAI(base_url=url, api_key="wrong").models.list()
    except openai.AuthenticationError as error:
        found["wrong_key"] = error.code
    replies = [[client.completions.create(**ASK, max_tokens=24) for _ in range(4)] for client in clients]
    found["texts"] = sorted({reply.choices[0].text for each in replies for reply in each})
    found["cached"] = [[reply.usage.prompt_tokens_details.cached_tokens for reply in each] for each in replies]

    lost = replicas()[0]
    os.kill(lost, signal.SIGKILL)
    found["texts_after_a_loss"] = sorted(
        {client.completions.create(**ASK, max_tokens=24).choices[0].text for client in clients}
    )
    end = time.monotonic() + MOST_SECONDS
    while (len(replicas()) < 2 or lost in replicas()) and time.monotonic() < end:
        time.sleep(0.5)
    found["replicas_after_a_loss"] = len(replicas())

    whole = clients[0].completions.create(**LONG).choices[0].text
    stream = clients[0].completions.create(**LONG, stream=True)
    pieces = [next(stream).choices[0].text]
    server.terminate()
    pieces += [chunk.choices[0].text for chunk in stream]
    found["streamed_to_the_end"] = "".join(pieces) == whole
    found["pieces"] = len(pieces)
    found["exit_code"] = server.wait(MOST_SECONDS)
    found["left"] = len(replicas())
    return found


def replicas() -> list[int]:
    """Processes that are one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::ServeReplica"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            pass
    return found


if __name__ == "__main__":
    main(sys.argv[1])
