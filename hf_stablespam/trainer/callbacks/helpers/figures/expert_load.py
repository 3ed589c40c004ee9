"""How many tokens each expert of a mixture gets."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_stablespam.monitor.figures import block_of
from hf_stablespam.quant.layers.experts import is_experts

PREFIX = "experts/"


class ExpertLoad:
    """Counts the tokens that routers send to each expert while a model trains, on the device.

    Args:
        model: a model; one without experts in the form of transformers 5 has no counts.
        restored: `knowledge()` of the run that goes on.
    """

    def __init__(self, model: nn.Module, restored: dict[str, Any]) -> None:
        self._counts: dict[str, Tensor] = {}
        self._handles = []
        for name, module in model.named_modules():
            if is_experts(module):
                device = next(module.parameters()).device
                saved = restored.get(name)
                count = int(module.num_experts)  # type: ignore[arg-type]
                zeros = torch.zeros(count, dtype=torch.int64, device=device)
                self._counts[name] = zeros if saved is None else torch.tensor(saved, device=device)
                self._handles.append(module.register_forward_pre_hook(self._counter(name), with_kwargs=True))

    def knowledge(self) -> dict[str, Any]:
        """The counts since they were last read, for a checkpoint."""
        return {name: counts.tolist() for name, counts in self._counts.items()}

    def take(self, by_block: bool) -> dict[str, float]:
        """Figures of the tokens since the last call; all processes call it together.

        Returns:
            `unused`, the experts that got no token, of all blocks together, and `load_max`, the largest share that an
            expert has of its block's tokens, over an even share: 1 where all get the same. With `by_block` both for
            each block as well.
        """
        if not self._counts:
            return {}
        counts = torch.cat([counts.cpu() for counts in self._counts.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = next(iter(self._counts.values())).device
            on_device = counts.to(device)
            torch.distributed.all_reduce(on_device)
            counts = on_device.cpu()
        sizes = [len(block) for block in self._counts.values()]
        for block in self._counts.values():
            block.zero_()
        figures: dict[str, float] = {}
        unused = 0
        loads: list[float] = []
        for name, block in zip(self._counts, counts.split(sizes), strict=True):
            none = int((block == 0).sum())
            load = float(block.max() * len(block) / block.sum()) if block.sum() else 0.0
            unused, loads = unused + none, [*loads, load]
            if by_block:
                part = block_of(f"{name}.weight")
                figures |= {f"unused/{part}": none, f"load_max/{part}": load}
        return {PREFIX + name: value for name, value in {"unused": unused, "load_max": max(loads), **figures}.items()}

    def close(self) -> None:
        """Leave the model as it was found."""
        for handle in self._handles:
            handle.remove()

    def _counter(self, name: str) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                index = args[1] if len(args) > 1 else next(value for key, value in kwargs.items() if "ind" in key)
                counts = self._counts[name]
                # Places past the last expert belong to other devices.
                chosen = index.detach().reshape(-1).clamp(max=len(counts))
                # Not bincount, whose result has a length that torch.compile would have to know.
                found = torch.zeros(len(counts) + 1, dtype=counts.dtype, device=chosen.device)
                counts += found.scatter_add(0, chosen, torch.ones_like(chosen))[:-1].to(counts.device)

        return count
