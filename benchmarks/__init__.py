"""Benchmarks: import, export and verify beside `cp` and `sync` of the same files.

    make bench
    make bench ARGS="--slow-disk 0.4"

cases        which models are measured, and for what
model_files  their files: random weights in the released layout, made in seconds
processes    one run of a process: time, CPU time, anonymous memory
rounds       the steps of a model, interleaved
figures      what the measurements come to, and the JSON document that holds them
goals        what they are compared with
host         what they were measured on
disk_speed   how fast its disk is
slow_disk    another disk, as slow as one likes
page, plot   the tables and the picture in docs/, made from the JSON document alone
cli          options, and the order of everything
"""
