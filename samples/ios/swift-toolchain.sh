#!/bin/sh
# A Swift 6 compiler where the system has none: Debian 13's in a folder of its own, .cache/swift of the repository.
#
#   swift-toolchain.sh                        gets it (root, debootstrap, 3 GB of disk); does nothing where it is there
#   swift-toolchain.sh run COMMAND...         runs a command with it, in the current folder
#   swift-toolchain.sh run --bind DIR COMMAND...  with one more folder of the host visible, under its own path
#
# A `swift` on the PATH is used in its stead. Nothing is installed into the host's system.
set -eu

suite=trixie
repository=$(cd "$(dirname "$0")/../.." && pwd -P)
root=$repository/.cache/swift

fail() {
    echo "swift-toolchain: $1" >&2
    exit 4
}

system_swift() {
    command -v swift >/dev/null 2>&1 && swift --version >/dev/null 2>&1
}

# Where this host gets Debian from: the same place has the newer release.
mirror() {
    apt-get indextargets --format '$(ORIGIN)|$(COMPONENT)|$(CREATED_BY)|$(SITE)' 2>/dev/null |
        awk -F'|' '$1 == "Debian" && $2 == "main" && $3 == "Packages" && $4 !~ /security/ { print $4; exit }'
}

install() {
    if system_swift; then
        echo "swift-toolchain: the system's own is used: $(swift --version 2>/dev/null | head -n 1)" >&2
        return
    fi
    [ -e "$root/installed" ] && return
    [ "$(uname -s)" = Linux ] || fail "there is no swift on the PATH: install Xcode 16 or the toolchain of swift.org"
    [ "$(id -u)" = 0 ] || fail "found user $(id -un), root is wanted for a chroot: run it with sudo, or install swift"
    command -v debootstrap >/dev/null || fail "debootstrap was not found: apt-get install debootstrap"
    url=$(mirror)
    [ -n "$url" ] || fail "apt knows of no Debian mirror on this host: run apt-get update on Debian, or install swift"

    rm -rf --one-file-system "$root" # what an interrupted run has left
    mkdir -p "$root"
    echo "swift-toolchain: Debian $suite into .cache/swift, some minutes" >&2
    debootstrap --variant=minbase "$suite" "$root" "$url" >"$root.log" 2>&1 ||
        fail "debootstrap failed, its last lines: $(tail -n 3 "$root.log")"
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d" # no service is to be started in there
    chmod +x "$root/usr/sbin/policy-rc.d"
    inside / "" sh -ec 'export DEBIAN_FRONTEND=noninteractive; apt-get update;
        apt-get install --yes --no-install-recommends swiftlang libc6-dev libstdc++-14-dev git ca-certificates;
        apt-get clean' >>"$root.log" 2>&1 ||
        fail "apt-get install swiftlang failed, its last lines: $(tail -n 3 "$root.log")"
    inside / "" swift --version >>"$root.log" 2>&1 ||
        fail "the compiler does not start, its last lines: $(tail -n 3 "$root.log")"
    touch "$root/installed"
}

# inside FOLDER BIND COMMAND...: in the chroot. The mounts are of a namespace that ends with the command, so that none
# is left behind and removing .cache/swift never reaches the host's files.
inside() {
    ROOT=$root REPOSITORY=$repository FOLDER=$1 BIND=$2
    export ROOT REPOSITORY FOLDER BIND
    shift 2
    unshare --mount --propagation private sh -ec '
        show() { mkdir -p "$ROOT$1"; mount --rbind "$1" "$ROOT$1"; }
        mount -t proc proc "$ROOT/proc"
        show /dev
        show /tmp
        show "$REPOSITORY"
        [ -z "$BIND" ] || show "$BIND"
        exec chroot "$ROOT" /bin/sh -ec "cd \"\$FOLDER\"; export HOME=/root LC_ALL=C.UTF-8; exec \"\$@\"" sh "$@"
    ' sh "$@"
}

case ${1:-install} in
install)
    install
    ;;
run)
    shift
    bind=
    if [ "${1:-}" = --bind ]; then
        bind=$(cd "$2" && pwd -P)
        shift 2
    fi
    install
    if system_swift; then
        exec "$@"
    fi
    inside "$(pwd -P)" "$bind" "$@"
    ;;
*)
    fail "found '$1', wanted nothing or run COMMAND..."
    ;;
esac
