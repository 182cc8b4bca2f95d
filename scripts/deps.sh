#!/bin/sh
# Says which system packages are missing and installs only those. With --check it only says so.
#
# What the test guest is made of (kernel, busybox, guest agent) is not installed: `cargo xtask guest` downloads it.
# Names are the same in Debian 12, Debian 13 and Ubuntu 24.04.
set -eu

missing=

# need PACKAGE WHY COMMAND…: the package is missing unless the command succeeds.
need() {
    package=$1 why=$2
    shift 2
    if ! "$@" > /dev/null 2>&1; then
        echo "missing: $package ($why)"
        missing="$missing $package"
    fi
}

has() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1"; }

# A library's file, wherever this machine's compiler would look for it.
has_library() { test -n "$(find /usr/lib /usr/lib64 -maxdepth 2 -name "$1" 2> /dev/null)"; }

need qemu-system-x86 "runs virtual machines" has qemu-system-x86_64
need ovmf "starts virtual machines with UEFI" test -e /usr/share/OVMF/OVMF_CODE_4M.fd
need swtpm "is the TPM of virtual machines that have one" has swtpm
need qemu-utils "makes and checks disk images" has qemu-img
need e2fsprogs "makes file systems for the tests" has mke2fs
need iproute2 "connects virtual machines to bridges" has ip
need gcc "compiles the C parts of dependencies" has cc
need libc6-dev "links the guest's probe statically" has_library libc.a
need slapd "a directory to log in against, for the tests" has slapd
need restic "reads and checks backups, in the tests" has restic
need openssh-server "takes backups over SFTP, in the tests" has sshd
need openssh-client "reaches backups over SFTP" has ssh
need nodejs "runs the identity provider of the tests" has node
need npm "fetches the identity provider of the tests" has npm
need python3-venv "runs the tests that send random requests to the API" python3 -c 'import venv, ensurepip'
if grep -q '^ID=ubuntu' /etc/os-release 2> /dev/null; then
    need zstd "unpacks the test guest's kernel modules" has zstd
fi

if [ -z "$missing" ]; then
    exit 0
fi
if [ "${1:-}" = --check ]; then
    exit 1
fi

install="apt-get install --yes --no-install-recommends$missing"
if ! has apt-get > /dev/null; then
    echo "this machine has no apt-get; install what these Debian packages hold, then go on:$missing" >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=
elif has sudo > /dev/null; then
    as_root=sudo
else
    echo "this needs root and there is no sudo; as root, run: apt-get update && $install" >&2
    exit 1
fi
echo "installing:$missing"
# Packages that bring a server must not start it: the tests run their own. This is the file that Debian's policy has
# for that; one that is there already is left alone, and stays.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap '$as_root rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" > /dev/null
    $as_root chmod 755 "$policy"
fi
# shellcheck disable=SC2086
$as_root apt-get update
# shellcheck disable=SC2086
$as_root env DEBIAN_FRONTEND=noninteractive $install
