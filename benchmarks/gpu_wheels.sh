#!/usr/bin/env bash
# What gpu_day wants on a machine with a GPU and no package index, as files of 40 MiB in all:
# Megatron-Core and its needs, other projects' heads, and Transformer Engine, whose torch part is
# built here (no GPU needed, but nvcc; ten minutes on two cores) and whose core keeps one
# architecture's code. There: tar -xf gpu_carry.tar.xz && . gpu_carry/env.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.12}
OUT=${OUT:-.gpu-wheels}
TORCH=${TORCH:-2.11.0}
ENGINE=${ENGINE:-2.20.2}
MEGATRON=${MEGATRON:-0.19.2}
ARCHITECTURE=${ARCHITECTURE:-90}
JOBS=${JOBS:-2}
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export CUDA_HOME

printf 'settings:\n'
for name in PYTHON OUT TORCH ENGINE MEGATRON ARCHITECTURE JOBS CUDA_HOME; do
    printf '  %s=%s\n' "$name" "${!name}"
done

mkdir -p "$OUT/wheels"
[ -x "$OUT/venv/bin/python" ] || "$PYTHON" -m venv "$OUT/venv"
pip() { "$OUT/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet "torch==$TORCH" numpy setuptools wheel ninja cmake pybind11 packaging

printf '\n== wheels without a build\n'
pip download --quiet --no-deps --dest "$OUT/wheels" --requirement requirements/gpu-carry.txt
pip download --quiet --no-deps --dest "$OUT/wheels" "megatron-core==$MEGATRON" \
    "transformer-engine==$ENGINE" "transformer-engine-cu13==$ENGINE"

if ! ls "$OUT"/wheels/transformer_engine_torch-"$ENGINE"-*.whl > /dev/null 2>&1; then
    printf '\n== Transformer Engine for torch %s\n' "$TORCH"
    nvidia=$("$OUT/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
    pip install --quiet --no-deps "$OUT"/wheels/transformer_engine_cu13-*.whl "$OUT"/wheels/transformer_engine-"$ENGINE"-*.whl
    CPATH=$nvidia/cu13/include:$nvidia/nccl/include:$nvidia/cudnn/include \
        LIBRARY_PATH=$nvidia/cu13/lib:$nvidia/nccl/lib:$nvidia/cudnn/lib \
        NVTE_CUDA_ARCHS=$ARCHITECTURE NVTE_FRAMEWORK=pytorch MAX_JOBS=$JOBS \
        PATH=$CUDA_HOME/bin:$PWD/$OUT/venv/bin:$PATH \
        "$OUT/venv/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation \
        --wheel-dir "$OUT/wheels" "transformer-engine-torch==$ENGINE"
fi

printf '\n== one folder, one architecture\n'
site=$OUT/gpu_carry/site
rm -rf "$OUT/gpu_carry" && mkdir -p "$site"
for wheel in "$OUT"/wheels/*.whl; do
    "$OUT/venv/bin/python" -m zipfile -e "$wheel" "$site"
done
rm -rf "$site/transformer_engine/jax"
core=$site/transformer_engine/wheel_lib/libtransformer_engine.so
"$OUT/venv/bin/python" benchmarks/one_architecture.py "$core" "$core.small" --architecture "$ARCHITECTURE"
mv "$core.small" "$core"
# Other copies of these libraries on the machine must not come first: with two cuDNN in one process
# Transformer Engine finds no kernels for packs.
cat > "$OUT/gpu_carry/env.sh" <<'ENV'
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nvidia=$("${PYTHON:-python3}" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
export PYTHONPATH=$here/site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
export CUDNN_PATH=$nvidia/cudnn CUDNN_HOME=$nvidia/cudnn NVTE_CUDA_INCLUDE_DIR=$nvidia/cu13
export LD_LIBRARY_PATH=$nvidia/cu13/lib:$nvidia/cudnn/lib:$nvidia/nccl/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
ENV
tar -C "$OUT" -cf - gpu_carry | xz -9 -T "$JOBS" > "$OUT/gpu_carry.tar.xz"
ls -l "$OUT/gpu_carry.tar.xz"
