# A picture grader in a box; docs/install.md tells how to use it.
#   docker build -t mirip-fast .                                      CPU, about 2 GB
#   docker build -t mirip-fast:cuda --build-arg TORCH=cuda .          CUDA, about 7 GB; run with --gpus all
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# cpu or cuda; uv knows where PyTorch without CUDA is, and TORCH_INDEX may name another index of it.
ARG TORCH=cpu
ARG TORCH_INDEX=

# Fonts for the names of works in pictures: Korean, Chinese, Japanese.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends fonts-noto-cjk \
    && rm -rf /var/lib/apt/lists/*

# PyTorch first: it changes rarely, so this layer is kept between builds.
RUN case "$TORCH" in \
      cpu) if [ -n "$TORCH_INDEX" ]; then \
             pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.4" "torchvision>=0.19"; \
           else \
             pip install --no-cache-dir uv \
             && uv pip install --system --no-cache --torch-backend cpu "torch>=2.4" "torchvision>=0.19"; \
           fi ;; \
      cuda) pip install --no-cache-dir "torch>=2.4" "torchvision>=0.19" ;; \
      *) echo "--build-arg TORCH=$TORCH: give cpu or cuda"; exit 1 ;; \
    esac

COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src

# Not root. Backbones that are downloaded are kept in /cache; anyone may write there, so that --user works.
RUN useradd --create-home --uid 1000 mirip && mkdir -m 1777 /cache /work
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache MPLCONFIGDIR=/cache/matplotlib
VOLUME /cache
WORKDIR /work
USER mirip
ENTRYPOINT ["mirip-fast"]
CMD ["--help"]
