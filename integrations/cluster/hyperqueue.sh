#!/bin/sh
# The jobs of a file, in eight tasks of HyperQueue, each with four cores. Flags of `dinv batch` follow:
#
#     sh integrations/cluster/hyperqueue.sh jobs.jsonl made --model sd15 --dtype f16
#
# HyperQueue starts a task again if its worker ends. A task that fails stays failed: the same line sends all of them again,
# and what is done is kept.
jobs=${1:?the file of jobs} made=${2:?the folder for the results}
shift 2
exec hq submit --array=1-8 --cpus=4 --env RAYON_NUM_THREADS=4 -- \
    "${DINV:-dinv}" batch "$jobs" -o "$made" --shard auto/8 -q "$@"
