"""What engines read and write: torch's distributed checkpoints through files that someone else opens, and pickles that
build data and run nothing."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.utils.serialization
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import safe_globals

from distrib.errors import UserError

RAW = "raw"
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
METADATA = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
}
"""All that torch puts into the index of a distributed checkpoint, beside data types."""


class Writer(FileSystemWriter):
    """Tensors as the bytes they are, which costs no more than to copy them, and holds no pickle."""

    def __init__(self, create: Callable[[str], Any]) -> None:
        super().__init__("", sync_files=False)
        self.fs: Any = _Files(create)

    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        written = []
        with self.fs.create_stream(name, "wb") as file:
            for item in plan.items:
                begin = file.tell()
                data = planner.resolve_data(item)
                file.write(data.getbuffer() if isinstance(data, io.BytesIO) else _bytes(data))
                length = file.tell() - begin
                written.append(WriteResult(item.index, length, _StorageInfo(name, begin, length, [RAW])))
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done


class SavePlanner(DefaultSavePlanner):
    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """The optimizer's settings are many, one a parameter: torch's older form of a file costs a tenth."""
        if write_item.type != WriteItemType.BYTE_IO:
            return object
        data = io.BytesIO()
        torch.save(object, data, _use_new_zipfile_serialization=False)
        return data


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class _Files(FileSystemBase):
    """As many files as are asked for, and no folder."""

    def __init__(self, create: Callable[[str], Any]) -> None:
        self._create = create

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        # The index is written under another name and renamed; here the whole checkpoint is.
        with self._create(Path(path).name.removesuffix(".tmp")) as file:
            yield file

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str | os.PathLike[str]:
        return Path(path) / suffix

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        pass

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return Path(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return False

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        pass


class Reader(FileSystemReader):
    """Of what Writer wrote, and torch's own writer before it; torch's reader unpickles the index freely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._known = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        others = []
        for item in plan.items:
            if self.storage_data[item.storage_index].transform_descriptors:
                self._read(item, planner)
            else:
                others.append(item)
        return super().read_data(replace(plan, items=others), planner)

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        place = self.storage_data[item.storage_index]
        with (Path(self.path) / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            data = bytearray(file.read(place.length))
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(data))
            return
        index = item.storage_index
        known: Any = self._known[index.fqn]
        (sizes,) = (chunk.sizes for chunk in known.chunks if chunk.offsets == index.offset)
        dtype = known.properties.dtype
        saved = torch.frombuffer(data, dtype=dtype).view(sizes) if data else torch.empty(sizes, dtype=dtype)
        target = planner.resolve_tensor(item).detach()
        target.copy_(narrow_tensor_by_index(saved, item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's index")


def unsummed() -> AbstractContextManager[None]:
    """torch.save without its checksums: whoever keeps the files hashes them."""
    config: Any = torch.utils.serialization.config
    patched: AbstractContextManager[None] = config.patch({"save.compute_crc32": False})
    return patched


@contextmanager
def only_data(folder: Path, *classes: type) -> Iterator[None]:
    """Whoever loads within builds tensors, plain containers and `classes`, whatever it asks torch for."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with safe_globals(list(classes)):
            yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        if (why := _refusal(error)) is None:
            raise
        raise UserError(f"{folder} holds more than data, which is not loaded: {why}") from None
    finally:
        os.environ.pop(FORCED)
        if before is not None:
            os.environ[FORCED] = before


def _refusal(error: BaseException) -> str | None:
    if isinstance(error, CheckpointException):
        # One a rank, each with its traceback.
        return next((why for cause, _ in error.failures.values() if (why := _refusal(cause))), None)
    if not isinstance(error, pickle.UnpicklingError):
        return None
    lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or str(error).splitlines())[0].strip()
