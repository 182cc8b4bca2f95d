#!/bin/sh
# Called by udhcpc with what the server said in its environment.
if [ "$1" = bound ] || [ "$1" = renew ]; then
    ip address replace "$ip/$mask" dev "$interface"
    if [ -n "$router" ]; then ip route replace default via "${router%% *}"; fi
    : > /etc/resolv.conf
    for server in $dns; do echo "nameserver $server" >> /etc/resolv.conf; done
fi
