#!/bin/sh
# All measurements that need a GPU: sh benchmarks/gpu.sh [GIB]. The same command resumes where it stopped.
# Writes results/*_cuda.json: predicted and measured memory and speed of every method, the largest batch that
# fits, the race, a training step of detection, and the loader with the device cache. This script has not been run yet.
set -eu
cd "$(dirname "$0")/.."
gib=${1:-$(python -c 'import torch; print(int(torch.cuda.mem_get_info()[1] / 2**30))')}

# Predicted and measured peaks; then the largest batch that `--fit` predicts for GIB is run.
rcmae compare cost --measure --device cuda --measured-batch 64 --fit "$gib" --out runs/gpu/cost
cp runs/gpu/cost/cost.json results/cost_cuda.json
for method in mae rcmae dino ibot msn mocov3 data2vec; do
  batch=$(python -c "
import json
rows = json.load(open('runs/gpu/cost/cost.json'))['rows']
print(next(r['fits'] for r in rows if r['method'] == '$method' and r['model'] == 'vit_small_patch16'))")
  rcmae compare cost --methods "$method" --models vit_small_patch16 --measure --device cuda --measured-batch "$batch" --out "runs/gpu/fit-$method"
  cp "runs/gpu/fit-$method/cost.json" "results/fit_${method}_cuda.json"
done

rcmae compare race --device cuda --budget "2e14 flops" --seeds 5 --out runs/gpu/race
cp runs/gpu/race/race.json results/race_cuda.json
for method in mae rcmae dino ibot msn mocov3 data2vec; do
  rcmae verify "$method" --device cuda --json "results/verify_${method}_cuda.json"
done

# A training step of detection on ViT-B at 1,024 px, with the largest of these batches that fits.
for batch in 16 8 4 2 1; do
  python -m benchmarks.detection_step --side 1024 --batch "$batch" --models vit_base_patch16_224 --rounds 10 --device cuda && break
done

# The loader beside others, with rows of --cache device.
python -m benchmarks.loader --out results/loader_cuda.json
