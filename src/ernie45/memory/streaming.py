"""Routed experts that are read from disk as they are needed: how many are held, and what a token reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ernie45.errors import InvalidRequestError
from ernie45.presets import INT4_GROUP, QuantPreset, Scheme, code_bytes, scale_bytes
from ernie45.spec import ExpertSpec, ModelSpec

NOMINAL_DISK_RATE = 1.5e9
"""Bytes a second of a disk that is not here: NVMe drives on four lanes of PCIe 3.0 are sold as reading 1.5 to 3.5
GB/s, and this is the slower end."""

_HELD_LAYERS = 2  # whose chosen experts have room at least: of one layer while those of the next are read
_MARGIN_SHARE = 0.02  # plans were within 1 % of what was measured
# A limit counts the whole process: 150 MiB that importing torch allocates, and the pages of libraries that are in use.
_IMPORT_BYTES = 192 * 2**20
_PANEL, _GROUPS_A_DWORD = 64, 4  # of quantization/panels.py: rows of a matrix, and int4's scales, are padded to these
_BLOCK_BYTES = 4096  # of a disk: the memory of an expert begins with one, and the expert as far into it as in its file


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedBank:
    """Routed experts of one width, over all layers: `num_experts` of them, of which a token goes through `num_chosen`,
    and `least_held` have to be in memory. There one takes `code_bytes` and `scale_bytes`, on disk `stored_bytes`."""

    num_experts: int
    num_chosen: int
    least_held: int
    code_bytes: int
    scale_bytes: int
    stored_bytes: int

    @property
    def held_bytes(self) -> int:
        """Of one expert in memory."""
        return self.code_bytes + self.scale_bytes


def streamed_banks(
    spec: ModelSpec, preset: QuantPreset, *, bytes_per_value: int, bytes_per_stored_value: int | None, native: bool
) -> tuple[StreamedBank, ...]:
    """The bank for text, and that for pictures where the model sees; none for a dense model. Numbers in the files take
    `bytes_per_stored_value`, None where they are stored as `preset` has them."""
    text = spec.experts
    num_layers = 0 if text is None else sum(map(text.in_layer, range(spec.num_layers)))
    if text is None or not num_layers:
        return ()
    banks = [text] if spec.vision is None else [text, spec.vision.experts]
    return tuple(
        _bank(spec, bank, num_layers, preset, bytes_per_value, bytes_per_stored_value, native) for bank in banks
    )


def usable_bytes(capacity_bytes: int) -> int:
    """What a plan that streams uses of a capacity: it would leave nothing over, where one that fits mostly does."""
    return capacity_bytes - int(_MARGIN_SHARE * capacity_bytes) - _IMPORT_BYTES


def share_out(banks: Sequence[StreamedBank], num_bytes: int) -> tuple[int, ...] | None:
    """How many experts of each bank are held in so many bytes; None where not even the fewest fit.

    Each bank has its `least_held`, and of what remains a share by the bytes of its other experts.
    """
    spare_bytes = num_bytes - sum(bank.least_held * bank.held_bytes for bank in banks)
    if spare_bytes < 0:
        return None
    missing = [bank.num_experts - bank.least_held for bank in banks]
    missing_bytes = sum(count * bank.held_bytes for count, bank in zip(missing, banks, strict=True))
    spare_bytes = min(spare_bytes, missing_bytes)
    return tuple(
        bank.least_held + (spare_bytes * count // missing_bytes if missing_bytes else 0)
        for count, bank in zip(missing, banks, strict=True)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRouting:
    """What the routers of a model chose for `num_tokens` text tokens: `num_chosen` of `num_experts` in each of
    `num_layers`. `hit_rate` gives the share that decoding would have found in memory with so many experts held."""

    num_tokens: int
    num_layers: int
    num_experts: int
    num_chosen: int
    hit_rate: Callable[[int], float]


def check_routing(routing: RecordedRouting, spec: ModelSpec, model: str) -> None:
    """Refuse what was not recorded of a model of this shape, with InvalidRequestError."""
    bank = spec.experts
    num_layers = 0 if bank is None else sum(map(bank.in_layer, range(spec.num_layers)))
    if bank is None or not num_layers:
        raise InvalidRequestError(f"routing= was given, but {model} has no routed experts", hint="leave it out")
    recorded = (routing.num_chosen, routing.num_experts, routing.num_layers)
    if recorded != (bank.experts_per_token, bank.num_experts, num_layers):
        raise InvalidRequestError(
            f"routing= is of another model: {routing.num_chosen} of {routing.num_experts} experts chosen in "
            f"{routing.num_layers} layers, where {model} chooses {bank.experts_per_token} of {bank.num_experts} in "
            f"{num_layers}",
            hint="give a trace of this model, which model.trace_routing() records",
        )


def token_read_bytes(bank: StreamedBank, hit_rate: float) -> int:
    """Bytes of experts that a token reads from disk: chosen · (1 - share in memory) · bytes of one."""
    return round(bank.num_chosen * (1 - hit_rate) * bank.stored_bytes)


def _bank(
    spec: ModelSpec,
    bank: ExpertSpec,
    num_layers: int,
    preset: QuantPreset,
    bytes_per_value: int,
    bytes_per_stored_value: int | None,
    native: bool,
) -> StreamedBank:
    hidden, width = spec.hidden_size, bank.intermediate_size
    codes = scales = stored = 0
    for out_features, in_features in ((2 * width, hidden), (hidden, width)):
        scheme = preset.scheme("routed_experts", in_features)
        held_codes = code_bytes(scheme, out_features, in_features, bytes_per_value)
        held_scales = scale_bytes(scheme, out_features, in_features)
        panels = _panel_bytes(scheme, out_features, in_features)
        if bytes_per_stored_value is None:
            stored += sum(panels) if scheme == "int4" else held_codes + held_scales
        if native:
            held_codes, held_scales = panels
        codes, scales = codes + held_codes, scales + held_scales
    if native:
        codes += -(codes + scales) % _BLOCK_BYTES + _BLOCK_BYTES
    num_experts = num_layers * bank.num_experts
    return StreamedBank(
        num_experts=num_experts,
        num_chosen=num_layers * bank.experts_per_token,
        least_held=min(_HELD_LAYERS * bank.experts_per_token, num_experts),
        code_bytes=codes,
        scale_bytes=scales,
        stored_bytes=stored if bytes_per_stored_value is None else 3 * hidden * width * bytes_per_stored_value,
    )


def _panel_bytes(scheme: Scheme | None, out_features: int, in_features: int) -> tuple[int, int]:
    """Codes and scales of a matrix in panels: rows are padded to a panel, and int4's scales to dwords."""
    num_rows = -(-out_features // _PANEL) * _PANEL
    if scheme is None:
        return num_rows * in_features * 2, 0
    if scheme == "int8":
        return num_rows * in_features, num_rows * 4
    dwords = -(-in_features // INT4_GROUP // _GROUPS_A_DWORD)
    return num_rows * (in_features // 2), num_rows * 4 * (dwords + 1)
