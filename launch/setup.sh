# shellcheck shell=bash
# Makes the Python environment that the other scripts run in. Sourced, not run: `vlkd_setup KIND`; KIND is runtime, dev
# (with what the tests need), cuda12, cuda13 or tpu (with that extra of jax).
# Sets VLKD_PYTHON (the interpreter) and VLKD_SETUP_SECONDS. VLKD_VENV names another place than .venv under the root.

VLKD_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() { # MESSAGE [EXIT CODE]
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

vlkd_require_writable() { # DIR: it, or the folder it would be made in, can be written in
  local place=$1
  while [[ ! -e $place ]]; do place="$(dirname -- "$place")"; done
  [[ -d $place ]] || fail "$place is no folder; name another place"
  [[ -w $place && -x $place ]] && return
  # GNU's stat, else BSD's
  local owner
  owner="$(stat -c %U -- "$place" 2>/dev/null || stat -f %Su -- "$place" 2>/dev/null || echo unknown)"
  fail "cannot write in $place (owner $owner, you are $(id -un)); name places of your own: VLKD_VENV=DIR for the packages${vlkd_results:-}"
}

vlkd_fingerprint() { # KIND: changes with the requirements, the package metadata and the place of the checkout
  local sum=(shasum -a 256)
  command -v sha256sum >/dev/null && sum=(sha256sum)
  (
    cd "$VLKD_ROOT" || exit
    cat requirements.txt requirements.lock pyproject.toml
    [[ $1 != dev ]] || cat requirements-dev.txt requirements-dev.lock requirements-transformers4.txt requirements-libtpu.txt requirements-beam.txt requirements-lmms-eval.txt
    printf '%s\n' "$VLKD_ROOT"
  ) | "${sum[@]}" | cut -d ' ' -f 1
}

vlkd_is_ready() { # KIND: the environment holds what this checkout asks for
  [[ ! -e $vlkd_marker && -x $VLKD_PYTHON && -f $vlkd_venv/.stamp-$1 ]] &&
    [[ $(<"$vlkd_venv/.stamp-$1") == "$(vlkd_fingerprint "$1")" ]]
}

vlkd_find_python() { # prints the first Python that is new enough and can make a virtual environment
  local name
  for name in python3.11 python3 python3.12 python3.13 python3.14; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    fi
  done
  return 1
}

vlkd_run() { # COMMAND...: quiet, into the log, with a sign of life every 15 seconds
  local since=$SECONDS pid code=0
  # killed with this script where the system can do that; elsewhere it runs on, holding the lock, and the next set-up waits
  command -v setpriv >/dev/null && set -- setpriv --pdeathsig KILL "$@"
  "$@" >>"$vlkd_log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM HUP
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.5 9>&-
    if ((SECONDS - since >= 15)); then
      since=$SECONDS
      printf '  still installing (%d s so far)\n' "$((SECONDS - vlkd_start))"
    fi
  done
  wait "$pid" || code=$?
  trap - INT TERM HUP
  return "$code"
}

vlkd_pip() { # pip install ARGUMENTS...
  vlkd_run "$VLKD_PYTHON" -m pip install --quiet --no-input --disable-pip-version-check --no-compile "$@" && return
  rm -f -- "$vlkd_marker" # pip ended by itself: what it had installed is whole
  local reason
  reason="$(grep -E '^ERROR' "$vlkd_log" | tail -n 1 || true)"
  local guess=" (is there a network?)"
  [[ $reason =~ Permission\ denied|Read-only\ file\ system|No\ space\ left|quota\ exceeded ]] && guess=""
  fail "could not install the packages$guess: ${reason:-pip failed}; full log: $vlkd_log" 1
}

vlkd_make_venv() {
  if [[ -e $vlkd_marker ]]; then
    echo "The last set-up of $vlkd_venv was cut off: starting it over."
    rm -rf -- "$vlkd_venv"
  fi
  if [[ -d $vlkd_venv && ! -e $vlkd_venv/pyvenv.cfg && -n $(ls -A -- "$vlkd_venv") ]]; then
    fail "$vlkd_venv is not empty and not a virtual environment; set VLKD_VENV to another place"
  fi
  if [[ -e $vlkd_venv/pyvenv.cfg && -x $VLKD_PYTHON ]]; then
    "$VLKD_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "$vlkd_venv holds a Python older than 3.11; delete it or set VLKD_VENV to another place"
    : >"$vlkd_marker"
    return
  fi
  local base
  base="$(vlkd_find_python)" ||
    fail "no Python 3.11 or newer with its venv module found (tried python3.11, python3, python3.12 to python3.14); install one"
  : >"$vlkd_marker"
  rm -rf -- "$vlkd_venv"
  vlkd_log="$vlkd_marker"
  vlkd_run "$base" -m venv "$vlkd_venv" || fail "$base -m venv failed: $(tail -n 1 "$vlkd_marker"); log: $vlkd_marker" 1
}

vlkd_source() { # prints the folder to install from: the checkout, or links to it where pip could not write beside it
  local links="$vlkd_venv/source" name
  if [[ -w $VLKD_ROOT && (! -e $VLKD_ROOT/vlkd_jax.egg-info || -w $VLKD_ROOT/vlkd_jax.egg-info) ]]; then
    printf '%s\n' "$VLKD_ROOT"
    return
  fi
  mkdir -p -- "$links"
  for name in pyproject.toml requirements.txt README.md LICENSE configs vlkd_jax; do
    ln -sfn -- "$VLKD_ROOT/$name" "$links/$name"
  done
  printf '%s\n' "$links"
}

vlkd_install() { # KIND
  local files=() flavour=txt name
  rm -f -- "$vlkd_venv"/.stamp-*
  vlkd_log="$vlkd_venv/install.log"
  : >"$vlkd_log"
  # the lock was frozen on Python 3.11; other versions resolve within the bounds of requirements.txt
  "$VLKD_PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && flavour=lock
  files=(-r "$VLKD_ROOT/requirements.$flavour")
  case $1 in
    dev) files+=(-r "$VLKD_ROOT/requirements-dev.$flavour") ;;
    cuda* | tpu) files+=("jax[$1]") ;; # the version is the one of the requirements
  esac
  vlkd_pip "${files[@]}"
  vlkd_pip --no-deps --editable "$(vlkd_source)"
  if [[ $1 == dev ]]; then # found where PYTHONPATH says so: what it needs beside these is the environment's
    for name in transformers4 libtpu beam lmms-eval; do
      vlkd_pip --no-deps --upgrade --target "$vlkd_venv/$name" -r "$VLKD_ROOT/requirements-$name.txt"
    done
  fi
  for name in runtime "$1"; do
    vlkd_fingerprint "$name" >"$vlkd_venv/.stamp-$name"
  done
  rm -f -- "$vlkd_marker"
}

vlkd_setup() { # KIND
  vlkd_start=$SECONDS
  vlkd_venv="${VLKD_VENV:-$VLKD_ROOT/.venv}"
  [[ $vlkd_venv == /* ]] || vlkd_venv="$PWD/$vlkd_venv"
  vlkd_marker="$vlkd_venv.installing" # there while a set-up runs, and after one that was cut off
  VLKD_PYTHON="$vlkd_venv/bin/python"
  if ! vlkd_is_ready "$1"; then
    vlkd_require_writable "$(dirname -- "$vlkd_venv")" # lock and marker lie beside it
    vlkd_require_writable "$vlkd_venv"
    mkdir -p -- "$(dirname -- "$vlkd_venv")"
    exec 9>"$vlkd_venv.lock"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
      echo "Waiting for another set-up of $vlkd_venv to end."
      until flock --timeout 15 9; do echo "  still waiting"; done
    fi
    if ! vlkd_is_ready "$1"; then
      echo "Setting up Python packages in $vlkd_venv (a few minutes the first time)."
      vlkd_make_venv
      vlkd_install "$1"
      echo "Set up in $((SECONDS - vlkd_start)) s."
    fi
    exec 9>&-
  fi
  # read by the script that sources this one
  # shellcheck disable=SC2034
  VLKD_SETUP_SECONDS=$((SECONDS - vlkd_start))
}

vlkd_add_torch() { # after vlkd_setup: PyTorch beside the packages, in the version that the tests compare with
  "$VLKD_PYTHON" -c 'import torch' 2>/dev/null && return
  echo "Installing torch, which only the comparison needs (minutes)."
  vlkd_log="$vlkd_venv/install.log"
  vlkd_pip "$(grep '^torch==' "$VLKD_ROOT/requirements-dev.lock")"
}
