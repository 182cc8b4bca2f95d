# Run in the guest of a clone: introduce HOSTNAME MACHINE-ID [OLD-MAC NEW-MAC ADDRESS GATEWAY]…
PATH=/usr/sbin:/usr/bin:/sbin:/bin
hostname "$1"
if [ -f /etc/hostname ]; then echo "$1" > /etc/hostname; fi
if [ -s /etc/machine-id ] && [ "$(cat /etc/machine-id)" != "$2" ]; then echo "$2" > /etc/machine-id; fi
shift 2

ask_for_address() {
    if command -v networkctl; then networkctl renew "$1"
    elif command -v nmcli; then nmcli device reapply "$1"
    elif command -v dhclient; then dhclient -r "$1"; dhclient -nw "$1"
    else udhcpc -i "$1" -n -q -t 20 -T 1 -s /etc/udhcpc.sh
    fi
}

take() {
    ip link set dev "$1" address "$2" || return 1
    ip address flush dev "$1" scope global || return 1
    if [ "$3" = - ]; then
        # It has no link before this script is done.
        ask_for_address "$1" > /dev/null 2>&1 < /dev/null &
        return 0
    fi
    ip address add "$3" dev "$1" || return 1
    if [ "$4" != - ]; then ip route replace default via "$4" || return 1; fi
}

while [ $# -ge 4 ]; do
    found=
    for file in /sys/class/net/*/address; do
        address=$(cat "$file")
        if [ "$address" = "$1" ] || [ "$address" = "$2" ]; then
            device=${file%/address}
            take "${device##*/}" "$2" "$3" "$4" || exit 1
            found=yes
            break
        fi
    done
    if [ -z "$found" ]; then exit 1; fi
    shift 4
done
