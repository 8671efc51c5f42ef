"""Reading what Hugging Face has released: references, configs, tensors, side files.

    reference          a folder or a hub id -> a folder
    config             config.json as plain JSON, with strict access
    tensors            the tensors of all shards, checked; safetensors_header and slice_reader
                       are its two halves, one file's header and one tensor's bytes
    side_files         what is not weights
    vlm                all of a model behind one object

`config` and `tensors` import neither torch nor transformers until a tensor is read.
"""
