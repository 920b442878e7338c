"""What all ranks must share before they begin: the output folder, the data and the versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

import avion_dali
from avion_dali.contracts import UserError
from avion_dali.data.manifest import Manifest
from avion_dali.engine.distributed import Distributed, require_agreement
from avion_dali.locks import folder_lock


@contextmanager
def shared_folder_lock(folder: str | Path, purpose: str, *, distributed: Distributed) -> Iterator[None]:
    """Hold an output folder for all ranks of this run; see `folder_lock`.

    Args:
        folder: the output folder, which rank 0 writes to.
        purpose: what the run does there.
        distributed: this rank among all.

    Yields:
        Nothing.

    Raises:
        UserError: on every rank, when another process holds the folder.
    """
    with ExitStack() as stack:
        refusal = ""
        if distributed.is_main:
            try:
                stack.enter_context(folder_lock(folder, purpose))
            except UserError as error:
                refusal = str(error)
        if dist.is_initialized():
            said = [refusal]
            dist.broadcast_object_list(said)
            refusal = said[0]
        if refusal:
            raise UserError(refusal)
        yield


def require_same_inputs(*manifests: Manifest | None) -> None:
    """Require that all ranks run the same versions on the same data; nothing in a single process.

    Ranks of different data would wait for each other forever at the end of an epoch.

    Args:
        *manifests: those of this rank, in the same order on every rank.

    Raises:
        UserError: on every rank, naming what differs.
    """
    facts = {"version of avion_dali": avion_dali.__version__, "version of torch": torch.__version__}
    opened = [manifest for manifest in manifests if manifest is not None]
    contents = {f"content of manifest {number}": m.fingerprint for number, m in enumerate(opened, start=1)}
    require_agreement({**facts, **contents})
