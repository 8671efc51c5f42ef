"""The classes that PyTorch makes an index of, by name."""

from megatron.bridge.formats.torch_dist.plain_pickle import Name

CLASSES = "torch.distributed.checkpoint.metadata"
FILES = "torch.distributed.checkpoint.filesystem"
"""Where PyTorch has the classes of an index."""

SIZE = Name("torch", "Size")
METADATA = Name(CLASSES, "Metadata")
TENSOR = Name(CLASSES, "TensorStorageMetadata")
PROPERTIES = Name(CLASSES, "TensorProperties")
OBJECT = Name(CLASSES, "BytesStorageMetadata")
CHUNK = Name(CLASSES, "ChunkStorageMetadata")
INDEX = Name(CLASSES, "MetadataIndex")
PLACE = Name(FILES, "_StorageInfo")
