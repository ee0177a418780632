"""What an answer says of its energy, and the final figure a moment later.

MELODI_ANSWER_ENERGY=1 vllm serve MODEL
python answer_energy.py http://127.0.0.1:8000 MODEL [http://127.0.0.1:9464]
"""

import json
import sys
import time
import urllib.request

SERVER, MODEL, PAGE = (*sys.argv[1:], "http://127.0.0.1:9464")[:3]


def fetch(url: str, body: object = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - as you said
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
        return answer.status, json.load(answer)


_, answer = fetch(
    f"{SERVER}/v1/chat/completions",
    {"model": MODEL, "messages": [{"role": "user", "content": "What is a joule?"}], "max_tokens": 400},
)
energy = answer["usage"]["energy"]
print("in the answer:", energy)

status = 202
while status == 202:  # not final yet
    time.sleep(0.5)
    status, energy = fetch(f"{PAGE}/melodi/requests/{energy['id']}")
print("final:        ", energy)
