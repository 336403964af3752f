# shellcheck shell=bash
# What the scripts share: messages, packages, ports, and daemons recorded by their PID. Source it
# after `set -euo pipefail`. The process_ functions keep their records in $run_dir.
# shellcheck disable=SC2034,SC2154 # The sourcing scripts set and read what is shared.

repo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly repo_root

# Debian's own interpreter: the wheels and the images are made for its version.
readonly python=/usr/bin/python3

say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

die() {
    say "$*"
    exit 1
}

need_root() {
    ((EUID == 0)) || die "must run as root"
}

# Installs the packages that are missing. Services that packages bring are kept from starting:
# Debian's docker-registry would otherwise listen on every interface.
install_packages() {
    local missing=() package
    for package in "$@"; do
        if [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) != "install ok installed" ]]; then
            missing+=("$package")
        fi
    done
    ((${#missing[@]})) || return 0
    need_root
    say "installing ${missing[*]}"

    (
        policy=/usr/sbin/policy-rc.d
        if [[ ! -e $policy ]]; then
            trap 'rm -f "$policy"' EXIT
            printf '#!/bin/sh\nexit 101\n' >"$policy"
            chmod 755 "$policy"
        fi
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Dpkg::Use-Pty=0 \
                --no-install-recommends "${missing[@]}"
    ) </dev/null >&2 || die "apt-get failed"
}

# What a build needs on a machine that has Rust: a linker and a compiler for the C dependencies.
install_build_tools() {
    command -v cargo >/dev/null || die "cargo is not on the PATH: install Rust first"
    command -v cc >/dev/null || install_packages gcc libc6-dev
}

need_fuse_device() {
    [[ -c /dev/fuse ]] || modprobe fuse 2>/dev/null || true
    [[ -c /dev/fuse ]] || die "there is no /dev/fuse: the kernel has no FUSE"
}

# port_answers PORT: whether something accepts connections on it on loopback.
port_answers() {
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# start_time PID: when the process started, in clock ticks since boot. With the PID it names
# one process for as long as the machine runs. Fails if no such process runs.
start_time() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # The second field, the name in parentheses, may hold spaces.
    stat=${stat##*) }
    # shellcheck disable=SC2086 # Split into fields on purpose.
    set -- $stat
    # One that has ended, and whose parent does not look.
    [[ $1 != Z ]] || return 1
    printf '%s\n' "${20}"
}

# process_start NAME LOG COMMAND…: starts a daemon and records it in $run_dir/NAME.pid.
process_start() {
    local name=$1 log=$2
    shift 2
    # The lock of `lab up` must not stay with the daemon.
    setsid "$@" </dev/null >>"$log" 2>&1 9>&- &
    local pid=$!
    printf '%s %s\n' "$pid" "$(start_time "$pid")" >"$run_dir/$name.pid"
}

# process_pid NAME: prints the PID if the process that process_start recorded still runs.
process_pid() {
    local pid started
    [[ -f $run_dir/$1.pid ]] || return 1
    read -r pid started <"$run_dir/$1.pid" || return 1
    [[ $pid =~ ^[0-9]+$ && -n $started && $(start_time "$pid") == "$started" ]] || return 1
    printf '%s\n' "$pid"
}

# process_stop NAME: stops what process_start started, and nothing else.
process_stop() {
    local pid _
    if pid=$(process_pid "$1"); then
        kill "$pid" 2>/dev/null || true
        for _ in {1..100}; do
            process_pid "$1" >/dev/null || break
            sleep 0.1
        done
        if process_pid "$1" >/dev/null; then
            say "$1 ($pid) ignores SIGTERM, killing it"
            kill -KILL "$pid" 2>/dev/null || true
        fi
    fi
    rm -f "$run_dir/$1.pid"
}

# wait_until SECONDS WHAT COMMAND…: repeats a command until it succeeds.
wait_until() {
    local tries=$(($1 * 10)) what=$2
    shift 2
    while ! "$@"; do
        ((tries-- > 0)) || die "$what did not come up in time"
        sleep 0.1
    done
}
