"""A vLLM server as far as the trainer can see: its routes, its weights, its tokens; and it fails on command."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ogls.policy.lora import Lora
from ogls.policy.policy import Policy
from ogls.records import Sampling
from ogls.rollout.server import FRESH, served_name
from ogls.rollout.transformers import TransformersEngine

LORA = Lora(rank=4)


class FakeServer:
    """Serves the model in `folder` until it is killed.

    Args:
        folder: of the model
        lora: of the adapters that it takes
        port: 0 takes any
        context_length: tokens that it holds
    """

    def __init__(self, folder: Path, lora: Lora | None = LORA, port: int = 0, context_length: int = 128) -> None:
        self.folder, self.context_length, self.lora = folder, context_length, lora
        self.name = served_name(folder)
        self.version = FRESH
        self.adapters: list[str] = []
        self.orders: list[str] = []  # paths of all that it was told to do, but for looks and tokens
        self.drawn = 0
        self.refused: dict[str, int] = {}  # status of a path that fails
        self.keeps_cache = self.deaf = self.foreign = False
        self.thought_ids: tuple[int, int] | None = None  # it was started for a budget of thoughts
        self.dies_at: int | None = None  # when so many prompts have been asked
        self.running = threading.Event()
        self.running.set()
        self.dead = False
        self._lock = threading.Lock()
        self._policy = Policy(str(folder), lora=lora, dtype="float32").load()
        self._engine = TransformersEngine()
        self._engine.start(folder, context_length)
        self._engine.load(self._policy, 0)
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner._handle(self, None)

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                owner._handle(self, json.loads(text) if text else None)

            def log_message(self, *_: Any) -> None:
                pass

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                pass

        self._http = Http(("127.0.0.1", port), Handler)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Ends at once: nothing under way is answered."""
        self.dead = True
        self.running.set()
        self._http.shutdown()
        self._http.server_close()

    def again(self) -> FakeServer:
        """The same address, started anew, as a supervisor does."""
        self.kill()
        return FakeServer(self.folder, self.lora, self.port, self.context_length)

    def freeze(self) -> None:
        self.running.clear()

    def thaw(self) -> None:
        self.running.set()

    def _handle(self, request: BaseHTTPRequestHandler, body: Any) -> None:
        self.running.wait()
        path = request.path
        if path == "/inference/v1/generate":
            self.drawn += 1
            if self.drawn == self.dies_at:
                self.dead = True
                threading.Thread(target=self.kill, daemon=True).start()
        status, answer = 200, None
        if self.dead:
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        if path in self.refused:
            status, answer = self.refused[path], {"error": "as it was told to"}
        else:
            with self._lock:
                try:
                    answer = self._answer(path, body)
                except Exception as error:
                    status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        text = b"" if answer is None else json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def _answer(self, path: str, body: Any) -> Any:
        if path == "/health":
            return None
        if path == "/v1/models":
            cards = [{"id": self.name, "root": str(self.folder), "max_model_len": self.context_length}]
            return {"data": cards + [{"id": name, "max_model_len": None} for name in self.adapters]}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/inference/v1/generate":
            return self._draw(body)
        self.orders.append(path)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
            assert files, "no weights"
            self._take({name: value for file in files for name, value in load_file(file).items()})
        elif path == "/v1/load_lora_adapter":
            assert body["lora_name"] not in self.adapters, "loaded already"
            if not self.deaf:
                self._policy.load_adapter(body["lora_path"])
            self._spoil()
            self.adapters.append(body["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            self.adapters.remove(body["lora_name"])
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/reset_prefix_cache":
            return {"success": not self.keeps_cache}
        elif path not in ("/pause?mode=abort", "/resume"):
            raise ValueError(f"no route {path}")
        return {}

    def _take(self, weights: dict[str, torch.Tensor]) -> None:
        own = dict(self._policy.model.named_parameters())
        for name, value in weights.items():
            if not self.deaf:
                found = own[name] if name in own else own[name.replace(".weight", ".base_layer.weight")]
                found.data.copy_(value)
        self._spoil()

    def _spoil(self) -> None:
        if self.foreign:
            torch.manual_seed(0)
            for p in self._policy.trainable().values() or self._policy.model.parameters():
                p.data += 0.05 * torch.randn_like(p)

    def _draw(self, body: Any) -> Any:
        told = body["sampling_params"]
        if body["model"] is not None and body["model"] not in self.adapters:
            raise ValueError(f"no adapter {body['model']}")
        names = ("max_tokens", "temperature", "top_p", "top_k", "thinking_token_budget")
        sampling = Sampling(**{name: told[name] for name in names})
        if sampling.thinking_token_budget is not None and self.thought_ids is None:
            raise ValueError("thinking_token_budget is set but reasoning_config is not configured. Please set ...")
        self._engine.thought_ids = self.thought_ids
        (group,) = self._engine.generate([body["token_ids"]], sampling, told["n"], told["seed"])
        return {
            "choices": [
                {
                    "index": i,
                    "token_ids": list(c.token_ids),
                    "logprobs": {"content": [{"logprob": p} for p in c.logprobs]},
                    "finish_reason": c.finish_reason,
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(c.token_ids)}],
                }
                for i, c in enumerate(group)
            ]
        }


@contextmanager
def serving(folder: Path, number: int = 1, lora: Lora | None = LORA, **settings: Any) -> Iterator[list[FakeServer]]:
    """Servers that end with the context, those that took their place in the list included."""
    servers = [FakeServer(folder, lora, **settings) for _ in range(number)]
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()
