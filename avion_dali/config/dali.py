"""Settings of decoding with DALI."""

from __future__ import annotations

from dataclasses import dataclass

from avion_dali.config.checks import require


@dataclass(frozen=True)
class DaliConfig:
    """How `decoder` dali decodes; none of it changes the clips.

    Args:
        graphs: DALI graphs per rank, which decode batches in turn, each on a CUDA stream of its own; 0 takes 2
            on a GPU and 1 on the CPU. Each needs GPU memory of its own.
        threads: clips that each graph decodes in parallel; 0 takes 16 over all graphs on a GPU, and one per
            core on the CPU.
        blocking_sync: threads that wait for the GPU sleep instead of spinning, so that cores are left to
            workers. It holds for all CUDA work of the process.

    Raises:
        UserError: when a value is out of range.
    """

    graphs: int = 0
    threads: int = 0
    blocking_sync: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.graphs <= 16, "`graphs`", value=self.graphs, allowed="in [0, 16] (0: automatic)")
        require(0 <= self.threads <= 256, "`threads`", value=self.threads, allowed="in [0, 256] (0: automatic)")
