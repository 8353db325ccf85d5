# syntax=docker/dockerfile:1
# The trainer on an NGC PyTorch image (its torch, Triton, Transformer Engine and apex), SGLang in an
# environment of its own, one NCCL for both. docs/container.md says how to build, run and import it,
# and where the base image's versions are published.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The image constrains pip to its own versions; these environments have pins of their own.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# SGLang first: it is the larger layer and changes least.
COPY requirements/container-sglang.txt /tmp/requirements/
RUN python3 -m venv /opt/sglang \
    && /opt/sglang/bin/pip install --require-hashes --no-deps \
        -r /tmp/requirements/container-sglang.txt

# NCCL refuses to connect two releases of itself, and weights travel from the trainer to the servers
# over it. Theirs, which has a hash among the pins, is newer than the image's: it takes its place.
RUN theirs=$(echo /opt/sglang/lib/python3.*/site-packages/nvidia/nccl/lib/libnccl.so.2) \
    && images=$(ldconfig -p | awk '$1 == "libnccl.so.2" && !found { print $NF; found = 1 }') \
    && test -n "${images}" \
    && install -m 644 "${theirs}" "$(readlink -f "${images}")"

COPY requirements/container.txt /tmp/requirements/
RUN python3 -m venv --system-site-packages /opt/trainer \
    && /opt/trainer/bin/pip install --require-hashes --no-deps \
        -r /tmp/requirements/container.txt

ARG USER_ID=10001
RUN useradd --create-home --uid "${USER_ID}" rlsd
COPY --chown=rlsd:rlsd . /opt/megatron_rlsd
RUN /opt/trainer/bin/pip install --no-deps --no-build-isolation -e /opt/megatron_rlsd \
    && rm -r /tmp/requirements

# The trainer starts SGLang from here unless rollout.sglang.python says otherwise. The build ends here
# where trainer and servers would not load the same NCCL.
RUN ln -s /opt/sglang /opt/megatron_rlsd/.venv-sglang \
    && /opt/trainer/bin/python -c \
    'from megatron_rlsd.diagnosis.agreement import check_agreement; print(check_agreement())'
ENV PATH=/opt/trainer/bin:${PATH} \
    PYTHON=/opt/trainer/bin/python

USER ${USER_ID}
WORKDIR /opt/megatron_rlsd
ENTRYPOINT ["/opt/megatron_rlsd/tools/container_entrypoint.sh"]
CMD ["help"]
