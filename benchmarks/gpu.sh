#!/bin/sh
# All that needs a GPU, in one go: sh benchmarks/gpu.sh [GIB]. The same command goes on where it stopped. Nobody has run it yet.
# It leaves results/*_cuda.json: memory and speed of every method beside what was predicted, the batch that fits, the race, a detector's step.
set -eu
cd "$(dirname "$0")/.."
gib=${1:-$(python -c 'import torch; print(int(torch.cuda.mem_get_info()[1] / 2**30))')}

# Predicted against measured peaks; the batch of `--fit` is tried by the second command at the memory that it was asked for.
rcmae compare cost --measure --device cuda --measured-batch 64 --fit "$gib" --out runs/gpu/cost
cp runs/gpu/cost/cost.json results/cost_cuda.json
for method in mae rcmae dino ibot msn mocov3; do
  batch=$(python -c "
import json
rows = json.load(open('runs/gpu/cost/cost.json'))['rows']
print(next(r['fits'] for r in rows if r['method'] == '$method' and r['model'] == 'vit_small_patch16'))")
  rcmae compare cost --methods "$method" --models vit_small_patch16 --measure --device cuda --measured-batch "$batch" --out "runs/gpu/fit-$method"
  cp "runs/gpu/fit-$method/cost.json" "results/fit_${method}_cuda.json"
done

rcmae compare race --device cuda --budget "2e14 flops" --seeds 5 --out runs/gpu/race
cp runs/gpu/race/race.json results/race_cuda.json
for method in mae rcmae dino ibot msn mocov3; do
  rcmae verify "$method" --device cuda --json "results/verify_${method}_cuda.json"
done

# A step of detection on ViT-B at 1,024 px, by the largest of these batches that fits.
for batch in 16 8 4 2 1; do
  python -m benchmarks.detection_step --side 1024 --batch "$batch" --models vit_base_patch16_224 --rounds 10 --device cuda && break
done
