"""The decoder of `models.decoder` in PyTorch, as fast as PyTorch makes it: the process behind `TorchSystem`.

    python -m benchmarks.torch_decoder FOLDER

FOLDER has setting.json, and given.npz where the weights are not random ones. Commands come as lines on stdin, answers
go to stdout as lines of JSON. The step is compiled by torch.compile (one projection for queries, keys and values, one
for gate and up) and replayed as one CUDA graph, token and position included, so that Python has no part in its time.
"""

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

_MASK = 0xFFFFFFFF
_PIECE = 1 << 24


def random_values(count: int, seed: int, middle: float, reach: float, device: str) -> torch.Tensor:
    """bf16[count], the values of `shapes.random_weight`; in pieces, since the integers take eight bytes each."""
    out = torch.empty(count, dtype=torch.bfloat16, device=device)
    for start in range(0, count, _PIECE):
        index = torch.arange(start, min(start + _PIECE, count), device=device)
        bits = (index * 0x9E3779B1 + seed) & _MASK
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = ((bits ^ (bits >> shift)) * factor) & _MASK
        unit = ((bits >> 24).float() - 127.5) / 128
        # As f32 tensors: PyTorch would keep Python's numbers in double precision.
        scale, offset = (torch.tensor(x, device=device) for x in (reach, middle))
        out[start : start + _PIECE] = (offset + unit * scale).bfloat16()
    return out


class Source:
    """Weights and cache by their path in the JAX model: random ones, or those of a file."""

    def __init__(self, folder: Path, device: str) -> None:
        self._device = device
        given = folder / "given.npz"
        self._given = dict(np.load(given)) if given.exists() else None

    def __call__(self, path: str, *shape: int) -> torch.Tensor:
        if self._given is not None:
            return torch.from_numpy(self._given[path].view(np.int16)).to(self._device).view(torch.bfloat16).view(shape)
        middle, reach = 0.0, math.sqrt(3 / (shape[1] if path.endswith("embedding") else shape[0]))
        if path.startswith("cache"):
            reach = math.sqrt(3)
        elif path.endswith("scale"):
            middle, reach = 1.0, 0.25
        values = random_values(math.prod(shape), zlib.crc32(path.encode()), middle, reach, self._device)
        return values.view(shape)

    def linear(self, inputs: int, **outputs: int) -> nn.Linear:
        """One projection of several kernels [inputs, outputs], given by path with "__" for the dots."""
        joined = torch.cat([self(f"{p.replace('__', '.')}.kernel", inputs, n).T for p, n in outputs.items()])
        return _linear(joined.contiguous())

    def norm(self, path: str, size: int, eps: float) -> nn.RMSNorm:
        norm = nn.RMSNorm(size, eps=eps, device="meta")
        norm.weight = nn.Parameter(self(f"{path}.scale", size), requires_grad=False)
        return norm


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Layer(nn.Module):
    """Attention and feed-forward with a static cache [batch, num_kv_heads, cache_len, head_dim]."""

    def __init__(self, setting: dict[str, Any], index: int, source: Source) -> None:
        super().__init__()
        hidden, ffn, size = setting["hidden_size"], setting["intermediate_size"], setting["head_dim"]
        self.heads, self.kv_heads, self.size = setting["num_heads"], setting["num_kv_heads"], size
        q, kv, eps, at = self.heads * size, self.kv_heads * size, setting["rms_eps"], f"layers__{index}__"
        self.qkv = source.linear(
            hidden, **{f"{at}self_attn__{name}_proj": n for name, n in (("q", q), ("k", kv), ("v", kv))}
        )
        self.out = source.linear(q, **{f"{at}self_attn__o_proj": hidden})
        self.gate_up = source.linear(hidden, **{f"{at}mlp__gate_proj": ffn, f"{at}mlp__up_proj": ffn})
        self.down = source.linear(ffn, **{f"{at}mlp__down_proj": hidden})
        self.before = source.norm(f"layers.{index}.input_layernorm", hidden, eps)
        self.between = source.norm(f"layers.{index}.post_attention_layernorm", hidden, eps)
        if setting["qk_norm"]:
            self.q_norm, self.k_norm = (source.norm(f"layers.{index}.self_attn.{n}_norm", size, eps) for n in "qk")
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        shape = (len(setting["token"]), setting["cache_len"], self.kv_heads, size)
        for name in ("keys", "values"):
            cache = source(f"cache.{index}.{name}", *shape)
            self.register_buffer(name, cache.transpose(1, 2).contiguous())

    def forward(
        self, x: torch.Tensor, pos: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        batch = x.shape[0]
        q, kv = self.heads * self.size, self.kv_heads * self.size
        queries, keys, values = (
            part.view(batch, 1, -1, self.size) for part in self.qkv(self.before(x)).split([q, kv, kv], -1)
        )
        queries, keys = _rotate(self.q_norm(queries), cos, sin), _rotate(self.k_norm(keys), cos, sin)
        self.keys[:, :, pos] = keys.transpose(1, 2)
        self.values[:, :, pos] = values.transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        x = x + self.out(attended.transpose(1, 2).reshape(batch, 1, q))
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Decoder(nn.Module):
    """A greedy step: what it reads and writes stays on the device."""

    def __init__(self, setting: dict[str, Any], source: Source) -> None:
        super().__init__()
        device, vocab, hidden = setting["device"], setting["vocab_size"], setting["hidden_size"]
        table = source("embed_tokens.embedding", vocab, hidden)
        self.table = nn.Parameter(table, requires_grad=False)
        self.layers = nn.ModuleList([Layer(setting, i, source) for i in range(setting["num_layers"])])
        self.norm = source.norm("norm", hidden, setting["rms_eps"])
        self.head = _linear(table) if setting["tie_embeddings"] else source.linear(hidden, lm_head=vocab)
        self.register_buffer("frequencies", torch.tensor(setting["frequencies"], device=device))
        self.cache_len = setting["cache_len"]

    def forward(self, token: torch.Tensor, pos: torch.Tensor, step: torch.Tensor, chosen: torch.Tensor) -> None:
        """Reads int64[batch, 1] at int64[1], writes the next token there and into int64[steps, batch] at int64[1]."""
        angles = pos.float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        mask = (torch.arange(self.cache_len, device=pos.device) <= pos)[None, None, None]
        x = F.embedding(token, self.table)
        for layer in self.layers:
            x = layer(x, pos, cos, sin, mask)
        best = self.head(self.norm(x)).argmax(-1)
        chosen[step] = best.T
        token.copy_(best)
        pos.add_(1)
        step.add_(1)


class Steps:
    """All steps of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        setting = self._setting = json.loads((folder / "setting.json").read_text())
        device = setting["device"]
        self._decoder = Decoder(setting, Source(folder, device)).eval()
        self._first = torch.tensor(setting["token"], device=device)[:, None]
        self._token, self._pos = self._first.clone(), torch.zeros(1, dtype=torch.long, device=device)
        self._step = torch.zeros(1, dtype=torch.long, device=device)
        self._chosen = torch.zeros(setting["steps"], len(setting["token"]), dtype=torch.long, device=device)
        self._before = [(layer.keys.clone(), layer.values.clone()) for layer in self._decoder.layers]
        self._advance: Callable[[], Any] = self._eager

    def prepare(self) -> dict[str, Any]:
        """Compiles, captures and runs once."""
        begin, mode = time.perf_counter(), self._setting["mode"]
        method = "eager"
        if mode != "eager":
            # As the fastest decoders in PyTorch do: at batch 1 products become generated kernels, and are tuned.
            torch._inductor.config.coordinate_descent_tuning = True
            self._decoder.compile(mode=mode, fullgraph=True, dynamic=False)
            method = f"torch.compile(mode={mode!r}), coordinate descent tuning"
        self._rewind()
        for _ in range(3 if mode != "eager" else 0):
            self._eager()
        if self._setting["device"] == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            self._rewind()
            with torch.cuda.graph(graph):
                self._eager()
            self._advance = graph.replay
            method += ", one CUDA graph per step"
        self.run()
        return {"compile_s": time.perf_counter() - begin, "method": f"torch {torch.__version__}: {method}"}

    def run(self) -> dict[str, Any]:
        """Runs all steps and waits."""
        self._rewind()
        for _ in range(self._setting["steps"]):
            self._advance()
        if self._setting["device"] == "cuda":
            torch.cuda.synchronize()
        return {}

    def result(self) -> dict[str, Any]:
        """Writes tokens and new keys and values, as the JAX model has them, to a file."""
        new = slice(self._setting["start"], self._setting["start"] + self._setting["steps"])
        caches = [(layer.keys, layer.values) for layer in self._decoder.layers]
        kept = torch.ones(self._setting["cache_len"], dtype=torch.bool, device=self._setting["device"])
        kept[new] = False
        strayed = any(
            not torch.equal(now[:, :, kept], was[:, :, kept])
            for pair, before in zip(caches, self._before)
            for now, was in zip(pair, before)
        )
        rows = [[cache[:, :, new].transpose(1, 2).float().cpu().numpy() for cache in pair] for pair in caches]
        keys, values = zip(*rows)
        path = self._folder / "result.npz"
        tokens = self._chosen.cpu().numpy().astype(np.int32)
        np.savez(path, tokens=tokens, keys=np.stack(keys), values=np.stack(values), strayed=strayed)
        return {"path": str(path)}

    def _eager(self) -> None:
        self._decoder(self._token, self._pos, self._step, self._chosen)

    def _rewind(self) -> None:
        self._token.copy_(self._first)
        self._pos.fill_(self._setting["start"])
        self._step.zero_()


def main() -> None:
    """Answers commands until stdin ends."""
    # Whatever a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    steps: Steps | None = None
    for line in sys.stdin:
        # Not before it is asked for: the device is someone else's until then.
        steps = steps or Steps(Path(sys.argv[1]))
        commands = {"prepare": steps.prepare, "run": steps.run, "result": steps.result}
        answers.write(json.dumps(commands[line.strip()]()) + "\n")


if __name__ == "__main__":
    main()
