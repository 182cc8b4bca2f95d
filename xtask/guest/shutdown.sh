#!/bin/sh
# Stops the guest in good order: the power button, the guest agent and people all come here.
case "$0 $*" in
    *reboot* | *" -r"*) how=reboot ;;
    *) how=poweroff ;;
esac
killall guest-probe
sync
umount /data || mount -o remount,ro /data
busybox "$how" -f
