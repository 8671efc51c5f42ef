"""Benchmarks: import, export and verify beside a plain copy of the same files.

    make bench

cases        which models are measured, and for what
model_files  their files: random weights in the released layout, made in seconds
processes    one run of a process: time, CPU time, anonymous memory
plain_copy   the copy, a process of its own
rounds       the steps of a model, interleaved
figures      what the measurements come to, and the JSON document that holds them
goals        what they are compared with
host         what they were measured on
page, plot   the tables and the picture in docs/, made from the JSON document alone
cli          options, and the order of everything
"""
