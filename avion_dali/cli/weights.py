"""`avion-dali weights`: describes weights, and converts them to safetensors. Slow imports are in functions."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avion_dali.contracts import UserError
from avion_dali.models.weight_facts import LAYOUTS, Layout
from avion_dali.wording import printable

if TYPE_CHECKING:
    from avion_dali.models.starting_weights import StartWeights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "weights", help="a file, open_clip:NAME/PRETRAINED or open_clip:NAME//FILE, as for model.weights"
    )
    parser.add_argument("--output", type=Path, help="safetensors file to write, with this project's names")
    parser.add_argument("--to", choices=LAYOUTS, help="write --output with another project's names")


def run(options: argparse.Namespace) -> int:
    """Describe the weights, and write them if --output is given."""
    output = options.output
    if options.to and output is None:
        raise UserError("--to requires --output, the file to write")
    if output is not None and output.suffix != ".safetensors":
        raise UserError(f"--output {output} must end in .safetensors")
    from avion_dali.models.starting_weights import open_start

    start = open_start(options.weights)
    print(printable("\n".join(description(start))))
    if output is not None:
        write(start, output, layout=options.to)
        print(f"written: {output}{f', in the names of {options.to}' if options.to else ''}")
    return 0


def description(start: StartWeights) -> list[str]:
    """Return lines that describe weights."""
    from avion_dali.models.starting_weights import by_reason

    facts = start.facts
    unknown = "not stored with the weights"
    frames = f"{facts.num_frames} frames" if facts.num_frames != 1 else "1 frame (an image model)"
    pixels = f"{facts.frame_size} x {facts.frame_size} pixels"
    size = f"model.size {facts.size}" if facts.size else "none of model.size"
    rows = {
        "family": f"{facts.family}, {facts.role}",
        "encoder": f"{facts.encoder}, width {facts.width}, {facts.layers} blocks, "
        f"patches of {facts.patch_size} pixels ({size})",
        "clips": f"{frames} of {pixels}" if facts.num_frames and facts.frame_size else unknown,
        "shared space": f"{facts.embed_dim} wide, texts of {facts.context_length} tokens",
        "classes": str(facts.num_classes),
        "normalization": facts.normalization or unknown,
        "activation": facts.activation or unknown,
        "norm eps": f"{facts.norm_eps:g}" if facts.norm_eps else unknown,
        "parameters": f"{sum(tensor.numel() for tensor in start.state.values()):,}",
    }
    if facts.role != "dual-encoder":
        del rows["shared space"]
    if not facts.num_classes:
        del rows["classes"]
    lines = [start.source, *(f"  {name:<14} {value}" for name, value in rows.items())]
    return lines + [f"  {'left over':<14} {text}" for text in by_reason(start.left_over)]


def write(start: StartWeights, path: Path, *, layout: Layout | None) -> None:
    """Write weights as safetensors with a header that describes them."""
    import json

    import safetensors.torch

    from avion_dali.engine.checkpoint import software_versions
    from avion_dali.files import atomic_write
    from avion_dali.models.convert import from_ours
    from avion_dali.models.implied_config import plain_config
    from avion_dali.models.safetensors_files import HEADER_KEY

    header: dict[str, Any] = {"weights": asdict(start.facts), "versions": software_versions()}
    if layout is None:
        state = start.state
        header |= {"config": config} if (config := start.config or plain_config(start.facts)) else {}
        header["classes"] = start.classes
    else:
        state = from_ours(start.state, layout, encoder=start.facts.encoder)
        header["layout"] = layout
    # Tensors are copied because safetensors rejects tensors that share memory.
    copies = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", HEADER_KEY: json.dumps(header)}
    content = safetensors.torch.save(copies, metadata=metadata)
    atomic_write(path, lambda file: file.write(content))
