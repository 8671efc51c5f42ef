"""Reading what Hugging Face has released: references, configs, tensors, side files.

    reference          a folder or a hub id -> a folder
    config             config.json as plain JSON, with strict access
    tensors            the headers of all shards, checked; tensors read by slice
    vlm                all of a model folder behind one object

`config` and `tensors` import neither torch nor transformers until a tensor is read.
"""
