"""One vLLM server is spoken to over HTTP: it is looked at, given weights, and asked for tokens.

Its control routes need ``VLLM_SERVER_DEV_MODE=1`` and no API key guards them, so that it belongs on a private network.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ogls.policy.pretrained import weights_sha256
from ogls.records import Completion, Sampling

FRESH = "default"
"""vLLM gives this version to the weights that a server has started with."""
ORDER = 600.0
"""A server may take this many seconds to carry out an order that has to do with weights."""
_GLANCE = 5.0  # seconds in which a server that is well answers a question about itself
_TOKEN = 60.0  # seconds in which it draws one token


class ServerFailed(RuntimeError):
    """A server does not answer, or answers what it may not."""


class Server:
    """A server samples for the trainer at `url`. Every answer but 200 is an error, and nothing is asked twice."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            self._port = parts.port
        except ValueError:
            self._port = None
        plain = f"http://{parts.hostname or ''}:{self._port}"
        if parts.scheme != "http" or not parts.hostname or self._port is None or url.rstrip("/") != plain:
            raise ValueError(f"data.engine.urls: expected addresses such as http://127.0.0.1:8001, got {url!r}")
        self.url, self.host = plain, parts.hostname
        self.spoilt = False  # an order about weights broke off: vLLM's engine may die at its next request
        self._open: set[socket.socket] = set()

    def __repr__(self) -> str:
        return self.url

    def well(self) -> bool:
        """Returns whether the server can be given weights now; after a broken order it has to draw a token first."""
        try:
            self.call("GET", "/health", within=_GLANCE)
            if self.spoilt and self.version() != FRESH:
                self.call("POST", "/resume", within=_GLANCE)
                token = _order([1], Sampling(max_tokens=1), 1, 0, (), None)
                self.call("POST", "/inference/v1/generate", token, _TOKEN)
        except ServerFailed:
            return False
        self.spoilt = False
        return True

    def version(self) -> str:
        """Returns the version of the server's weights, as whoever gave them has named it."""
        return self.call("GET", "/weight_info", within=_GLANCE)["weight_version"]

    def check(self, name: str, context_length: int) -> None:
        """Looks at what the server serves.

        Args:
            name: name of the model that it has to serve (`served_name`)
            context_length: tokens that a prompt and its completion may have

        Raises:
            ValueError: it serves another model, holds too few tokens, or was started without what is needed here.
        """
        cure = "start it by experiments/serve.py with the same --config"
        served = self.call("GET", "/v1/models", within=_GLANCE)["data"][0]
        if served["id"] != name:
            raise ValueError(f"{self.url} serves the model {served['id']!r}, the policy's is {name!r}: {cure}")
        if served["max_model_len"] < context_length:
            raise ValueError(f"{self.url} holds {served['max_model_len']} tokens, needed are {context_length}: {cure}")
        try:
            self.version()
        except ServerFailed as error:
            raise ValueError(f"{self.url} takes no weights ({error}): {cure}") from error

    def pause(self) -> None:
        """Has the server stop drawing, so that its weights can change; nobody waits for what was under way."""
        self.spoilt = True
        self.call("POST", "/pause?mode=abort")

    def resume(self, version: str) -> None:
        """Has the server drop what it computed with older weights, and go on with those that are named `version`."""
        if self.call("POST", "/reset_prefix_cache") != {"success": True}:
            raise ServerFailed(f"{self.url} keeps keys and values of older weights")
        self.call("POST", "/update_weight_version", {"new_version": version})
        self.call("POST", "/resume")
        self.spoilt = False

    def draw(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        n: int,
        seed: int,
        ends: Sequence[int],
        version: str,
        adapter: bool,
        within: float,
    ) -> list[Completion]:
        """Returns `n` completions of a prompt, all of whose tokens are from the weights of `version`.

        Args:
            prompt: token ids
            sampling: rule by which tokens are drawn
            n: number of completions
            seed: random seed
            ends: token ids that end a completion
            version: name of the weights
            adapter: whether this is the name of an adapter, too
            within: seconds that the server may take

        Raises:
            ServerFailed: the server does not answer, or gives something else.
            ValueError: thoughts have a budget, and the server was started without one.
        """
        order = _order(prompt, sampling, n, seed, ends, version if adapter else None)
        try:
            answer = self.call("POST", "/inference/v1/generate", order, within)
        except ServerFailed as error:
            if "reasoning_config is not configured" in str(error):
                raise ValueError(
                    f"{self.url} was started without data.evaluation.sampling.thinking_token_budget: start it by "
                    "experiments/serve.py with the same --config"
                ) from error
            raise
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            drawn = {span["version"] for choice in choices for span in choice["weight_versions"] or [{"version": None}]}
            completions = [_completion(choice) for choice in choices]
        except (KeyError, TypeError) as error:
            raise ServerFailed(f"{self.url} gave no completion: {type(error).__name__} {error}") from error
        if drawn != {version} or len(completions) != n:
            raise ServerFailed(
                f"{self.url} drew {len(completions)} of {n} with the weights {drawn}, expected {version}"
            )
        return completions

    def call(self, verb: str, path: str, body: Any = None, within: float = ORDER) -> Any:
        """Returns what the server answers, from JSON; None where it answers with nothing.

        Raises:
            ServerFailed: it cannot be reached, is silent for `within` seconds, or refuses.
        """
        connection = http.client.HTTPConnection(self.host, self._port, timeout=within)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        line: Any = None
        try:
            connection.connect()
            line = connection.sock
            self._open.add(line)
            connection.request(verb, path, None if body is None else json.dumps(body), headers)
            with connection.getresponse() as answer:
                text = answer.read()
            if answer.status != 200:
                raise ServerFailed(f"{verb} {self.url}{path} gave {answer.status}: {_short(text)}")
            return json.loads(text) if text[:1] in (b"{", b"[") else None
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            silent = isinstance(error, TimeoutError)
            why = f"no answer within {within:g} s" if silent else f"{type(error).__name__}: {error}"
            raise ServerFailed(f"{verb} {self.url}{path}: {why}") from error
        finally:
            self._open.discard(line)
            connection.close()

    def hang_up(self) -> None:
        """Breaks off all calls under way, in whatever thread; each of them fails, and the server drops what it does."""
        for line in list(self._open):
            with suppress(OSError):  # it has just ended
                line.shutdown(socket.SHUT_RDWR)


def served_name(folder: Path) -> str:
    """Returns the name under which servers serve the model in `folder`: the same name is the same weights."""
    return f"ogls-{weights_sha256(folder)[:16]}"


def _order(
    prompt: Sequence[int], sampling: Sampling, n: int, seed: int, ends: Sequence[int], adapter: str | None
) -> dict[str, Any]:
    parameters = {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "thinking_token_budget": sampling.thinking_token_budget,
        "stop_token_ids": list(ends),
        "ignore_eos": True,  # the tokenizer's end token may be another one
        "logprobs": 0,
        "detokenize": False,
        "seed": seed % 2**62,  # vLLM adds the number of the completion
    }
    return {"model": adapter, "token_ids": list(prompt), "sampling_params": parameters}


def _completion(choice: dict[str, Any]) -> Completion:
    logprobs = tuple(token["logprob"] for token in choice["logprobs"]["content"])
    return Completion(token_ids=tuple(choice["token_ids"]), logprobs=logprobs, finish_reason=choice["finish_reason"])


def _short(text: bytes) -> str:
    return " ".join(text[:300].decode(errors="replace").split())
