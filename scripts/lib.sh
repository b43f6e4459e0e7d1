# Functions shared by the scripts of this directory; to be sourced by bash after `set -euo pipefail`.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
unset PYTHONDONTWRITEBYTECODE # where it is set, every start of diskchain compiles it anew: 340 instead of 180 ms

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# Print the comment block at the top of the calling script: its --help.
print_help() { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; }

can_be_root() { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }

# as_root COMMAND...: run it as root, through sudo if need be.
as_root() {
    can_be_root || die "needs root, or sudo, to run: $*"
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@"; }

is_installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# need_apt PACKAGE...: install the Debian packages that are missing.
need_apt() {
    local package missing=()
    command -v apt-get >/dev/null || die "needs a Debian system with these packages: $*"
    for package; do
        is_installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    can_be_root || die "needs root, or sudo, to install: ${missing[*]}"
    say "installing ${missing[*]}"
    install_packages "${missing[@]}" 2>/dev/null && return
    apt_get update # the lists may be empty or old
    install_packages "$@" || die "apt-get could not install: ${missing[*]}"
}

# need_libvirt: what a private libvirtd of the tests needs. No system daemon is installed or started; the user that it
# looks up at its start comes with one.
need_libvirt() {
    need_apt libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients swtpm swtpm-tools
    getent group libvirt-qemu >/dev/null || as_root groupadd --system libvirt-qemu
    getent group kvm >/dev/null || as_root groupadd --system kvm
    getent passwd libvirt-qemu >/dev/null || as_root useradd --system --no-create-home --home-dir /var/lib/libvirt \
        --shell /usr/sbin/nologin --gid libvirt-qemu --groups kvm libvirt-qemu
}

install_packages() { apt_get install --yes --no-install-recommends "$@" >/dev/null; }

# Print the Python for the virtual environment. Only Debian's own can use apt's python3-libvirt.
find_python() {
    local python
    for python in /usr/bin/python3 python3; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    die "needs Python 3.11 or newer"
}

# list_requirements dev: print the dependency group of pyproject.toml, one a line (old pip has no --group).
list_requirements() {
    "$PYTHON" - "$ROOT/pyproject.toml" "$1" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["dependency-groups"][sys.argv[2]], sep="\n")
PYTHON
}

# need_venv [dev]: make VENV (default .venv) with diskchain in it, editable; with dev also what the tests need.
# Quick when pyproject.toml has not changed since. --system-site-packages: libvirt-python comes from apt.
need_venv() {
    local extra=() stamp
    VENV=${DISKCHAIN_VENV:-$ROOT/.venv}
    need_apt python3-venv python3-libvirt
    PYTHON=$(find_python)
    stamp="$(sha256sum <"$ROOT/pyproject.toml") $("$PYTHON" -V) $PYTHON $ROOT"
    is_stamped "$VENV/stamp-dev" "$stamp" && return
    [ "${1-}" != dev ] && is_stamped "$VENV/stamp" "$stamp" && return
    say "making $VENV"
    [ "${1-}" != dev ] || mapfile -t extra < <(list_requirements dev)
    "$PYTHON" -m venv --clear --system-site-packages "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$ROOT" "${extra[@]}"
    printf '%s\n' "$stamp" >"$VENV/stamp${1:+-$1}"
}

is_stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }
