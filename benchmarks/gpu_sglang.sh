#!/usr/bin/env bash
# A test stand: SGLang on a GPU machine that has another release of torch than SGLang is built for,
# and no package index. For gpu_day's stage `served`; not the environment that the project pins.
#
# SGLang's own code is the tested release. Its compiled kernels are of the last release of
# sglang-kernel that is built for this torch (a later one loads with five symbols added, but reads
# tensors at other offsets: torch's TensorImpl has changed). Packages that a dense model with
# attention by Triton never calls stay behind, as do models of other families; IPython is an empty
# stand-in. Kernels that SGLang would compile on the machine are built here (nvcc, no GPU) and found
# by their names. There: tar -xf sglang_carry.tar.xz && export SGLANG_PYTHON=$PWD/sglang_carry/python
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3.12}
OUT=${OUT:-.gpu-wheels}
TORCH=${TORCH:-2.11.0}
SGLANG=${SGLANG:-0.5.23}
KERNEL=${KERNEL:-0.4.6}
TRANSFORMERS=${TRANSFORMERS:-5.17.0}
JOBS=${JOBS:-2}
CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export CUDA_HOME

printf 'settings:\n'
for name in PYTHON OUT TORCH SGLANG KERNEL TRANSFORMERS JOBS CUDA_HOME; do
    printf '  %s=%s\n' "$name" "${!name}"
done

wheels=$OUT/sglang_wheels carry=$OUT/sglang_carry
site=$carry/site
mkdir -p "$wheels"
[ -x "$OUT/venv/bin/python" ] || "$PYTHON" -m venv "$OUT/venv"
pip() { "$OUT/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# What the machine has already, to build the kernels.
pip install --quiet "torch==$TORCH" numpy "transformers==$TRANSFORMERS" ninja aiohttp uvloop pillow \
    scipy sentencepiece requests psutil httpx prometheus-client nvidia-ml-py torchvision einops \
    sympy numba tiktoken

printf '\n== wheels\n'
pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" \
    --requirement requirements/gpu-sglang-carry.txt "sglang==$SGLANG" "sglang-kernel==$KERNEL"

printf '\n== one folder\n'
rm -rf "$carry" && mkdir -p "$site/IPython" "$carry/kernels"
for wheel in "$wheels"/*.whl; do
    case $wheel in
        # Attention by other backends: a gigabyte.
        */sglang_kernel-*) unzip -q -o "$wheel" 'sgl_kernel/*.py' 'sgl_kernel/sm90/*' '*.dist-info/*' -d "$site" ;;
        *) unzip -q -o "$wheel" -d "$site" ;;
    esac
done
echo 'HTML = display = None' > "$site/IPython/display.py"
: > "$site/IPython/__init__.py"
rm -rf "$site"/*.data "$site"/sglang/{multimodal_gen,test} "$site"/sglang/srt/rust_extensions/*.so \
    "$site"/zstandard/_cffi* "$site"/torch_memory_saver_hook_mode_torch*.so \
    "$site"/torch_memory_saver_hook_mode_preload{,_cu12}.abi3.so
find "$site/sglang/srt/models" -mindepth 1 -maxdepth 1 -regextype posix-extended \
    ! -regex '.*/(__init__|llama|qwen2|qwen3|registry|utils|transformers|deepseek_common)(\.py)?' \
    -exec rm -rf {} +
cat benchmarks/gpu_sglang/prebuilt_kernels.py >> "$site/sglang/kernels/jit/utils/compile/loader.py"
# A fused product that imports a package of 92 MB wherever there is CUDA: not without it.
sed -i 's/^        if not is_cuda():$/        from importlib.util import find_spec\n\n        if not is_cuda() or find_spec("cutlass") is None:/' \
    "$site/sglang/srt/layers/dual_gemm.py"
cp benchmarks/gpu_sglang/python "$carry/python"

printf '\n== kernels\n'
SGLANG_BASE_PYTHON=$PWD/$OUT/venv/bin/python SGLANG_RECORD_KERNELS=1 \
    SGLANG_JIT_CACHE_DIR=$OUT/sglang_jit "$carry/python" benchmarks/gpu_sglang/build_kernels.py

find "$carry" -name __pycache__ -prune -exec rm -rf {} +
find "$site" "$carry/kernels" -name '*.so*' ! -path '*/sgl_kernel/*' -exec strip --strip-unneeded {} + || true
tar -C "$OUT" -cf - sglang_carry | xz -9 -T "$JOBS" > "$OUT/sglang_carry.tar.xz"
ls -l "$OUT/sglang_carry.tar.xz"
