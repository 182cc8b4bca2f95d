#!/bin/sh
# First process of the test guest. What the probe's "ready" depends on comes first, in order; the rest follows
# when the guest is ready already. Everything is idempotent enough for a guest that is reset at any moment.
PATH=/sbin:/bin
export PATH
set -f

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec < /dev/console > /dev/console 2>&1
mkdir -p /dev/pts /dev/virtio-ports
mount -t devpts devpts /dev/pts

say() { echo "guest: $*"; }

load() {
    while read -r module; do
        insmod "/lib/modules/$module.ko" || say "module $module can't be loaded"
    done < "/lib/modules/$1"
}

# A NoCloud seed is a FAT or ISO file system labelled CIDATA; the label stands in one of two sectors.
is_seed() {
    { dd if="$1" bs=512 count=1; dd if="$1" bs=2048 skip=16 count=1; } 2> /dev/null |
        tr '\000' '\n' | grep -qi cidata
}

find_seed() {
    set +f
    for disk in /dev/vd[b-z] /dev/vda /dev/sr0; do
        if [ -b "$disk" ] && is_seed "$disk"; then echo "$disk"; break; fi
    done
    set -f
}

is_blank() {
    [ "$(dd if="$1" bs=65536 count=1 2> /dev/null | tr -d '\000' | head -c 1 | wc -c)" -eq 0 ]
}

# A disk for files. It is formatted only when it is blank, and never beyond 1 GiB, because writing the inode tables of a
# large disk would take longer than the boot.
mount_disk() {
    disk=/dev/$1
    if [ ! -b "$disk" ] || [ "$disk" = "$seed" ]; then return 1; fi
    if is_blank "$disk"; then
        kib=$(($(cat "/sys/block/$1/size") / 2))
        if [ "$kib" -gt 1048576 ]; then kib=1048576; fi
        mke2fs -F -b 4096 -i 65536 -I 256 -m 0 -L data "$disk" "$kib" > /dev/null || return 1
    fi
    mkdir -p "$2"
    mount -t ext4 -o noatime "$disk" "$2" && return 0
    say "$disk holds no file system that is known here: it is left alone, and there is no $2"
    return 1
}

# The first disk, and those that are called data1, data2 and so on: the probe's files are on all of them in turn.
mount_all() {
    if mount_disk vda /data; then directories="--data /data/probe"; fi
    set +f
    for serial in /sys/block/vd*/serial; do
        name=$(cat "$serial" 2> /dev/null)
        disk=${serial%/serial}
        case $name in
            data[1-9]) mount_disk "${disk##*/}" "/$name" && directories="$directories --data /$name/probe" ;;
        esac
    done
    set -f
}

dhcp() {
    udhcpc -i eth0 -n -q -t 5 -T 1 -A 1 -s /etc/udhcpc.sh > /dev/null 2>&1 || say "no DHCP server answers"
}

apply() {
    case $1 in
        address) ip address add "$2" dev eth0 ;;
        gateway) ip route replace default via "$2" ;;
        nameserver) echo "nameserver $2" >> /etc/resolv.conf ;;
        dhcp) dhcp ;;
    esac
}

read_seed() {
    load seed
    mkdir -p /seed
    mount -o ro -t vfat "$seed" /seed 2> /dev/null || mount -o ro -t iso9660 "$seed" /seed || return
    name=$(sed -n 's/^local-hostname:[ "]*\([A-Za-z0-9.-]*\).*/\1/p' /seed/meta-data)
    if [ -n "$name" ]; then hostname "$name"; fi
    if [ -f /seed/network-config ]; then guest-probe netconf /seed/network-config > /run/network; fi
    umount /seed
}

# Addresses come from the kernel's command line (ip=ADDRESS/PREFIX[,GATEWAY]), else from the seed; a guest that
# was told nothing asks for one and does not wait for the answer.
network() {
    ip link set lo up
    [ -d /sys/class/net/eth0 ] || return
    ip link set eth0 up
    if [ -n "$ip" ]; then
        apply address "${ip%%,*}"
        case $ip in *,*) apply gateway "${ip#*,}" ;; esac
    elif [ -s /run/network ]; then
        while read -r word value; do apply "$word" "$value"; done < /run/network
    else
        dhcp &
    fi
}

ip=
settings=
for word in $(cat /proc/cmdline); do
    case $word in
        ip=*) ip=${word#ip=} ;;
        probe.*) settings="$settings ${word#probe.}" ;;
    esac
done

hostname berth-guest
load early
seed=$(find_seed)
if [ -n "$seed" ]; then read_seed; fi
network
directories=
mount_all
# shellcheck disable=SC2086
guest-probe run --own-kernel $directories $settings &

# From here on the guest is ready: what follows may take its time.
set +f
for port in /sys/class/virtio-ports/*; do
    [ -f "$port/name" ] && ln -s "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done
load late
mkdir -p /dev/input
acpid -c /etc/acpi -l /dev/null -p /run/acpid.pid
agent=/dev/virtio-ports/org.qemu.guest_agent.0
if [ -c "$agent" ]; then
    while :; do
        qemu-ga -m virtio-serial -p "$agent" -t /run
        sleep 1
    done &
fi
busybox --install -s /bin

while :; do
    setsid cttyhack sh -l
    sleep 1
done
