# What a machine is, as far as an installation could change it: one KIND<tab>THING a line, in no order. Changes nothing.
export LC_ALL=C
kind() { sed "s/^/$1	/"; }
# Not: dpkg's and apt's own (the packages stand below), logs, caches, the database, and what depmod makes anew for any module.
find / -xdev \( -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/log -o -path /var/cache -o -path /srv/mysql/var/lib/mysql \
    -o -path /srv/mysql/run -o -path '*/lib/modules/*/modules.*' \) -prune \
    -o -type d -printf 'd %m %U:%G %p\n' -o -printf '%y %m %U:%G %s %T@ %p %l\n' 2>/dev/null | kind file
# In those, and in what is no disk, whatever is called like us. Logs say that we were there, and may.
find /var/lib/dpkg /var/lib/apt /var/cache /run /dev -xdev \( -iname '*poolskip*' -o -iname '*guest-probe*' -o -iname '*dom0-migrator*' \) 2>/dev/null |
    kind named
dpkg-query -W -f='${Package} ${Version} ${db:Status-Abbrev}\n' | kind package
# Not those that are only named by another unit and are nowhere.
systemctl list-units --all --no-legend --no-pager --plain --type=service,socket,timer,target,path |
    awk '$2 != "not-found" { print $1, $3 }' |
    grep -v '^run-\|^systemd-tmpfiles-clean' | kind unit
cut -d' ' -f1 /proc/modules | kind module
ps -eo ppid=,comm= | awk '$1 != 2 { print $2 }' | grep -vx 'bash\|sh\|socat\|sshd\|ps\|awk\|sed\|grep\|sort\|sleep\|find\|kthreadd\|mysql' | kind process
# By hexadecimal port; `ss` would load modules.
cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == "0A" { sub(/.*:/, "", $2); print $2 }' | kind listening
# Programs, maps and links of the kernel's virtual machine, and who holds them; events that probes hang on.
find /proc/[0-9]*/fd -maxdepth 1 \( -lname '*bpf*' -o -lname '*perf_event*' \) -printf '%h %l\n' 2>/dev/null |
    while read -r directory link; do echo "$(cat "${directory%/fd}/comm" 2>/dev/null) $link"; done | kind kernel-program
ls /sys/fs/bpf 2>/dev/null | kind kernel-program
cat /sys/kernel/tracing/uprobe_events 2>/dev/null | kind probe
# Every byte of mysqld's code, as it stands in its memory: a probe is a breakpoint there.
for pid in $(pgrep -x mysqld); do
    sed -n 's|^\([0-9a-f]*\)-\([0-9a-f]*\) r-xp .*/mysqld$|\1 \2|p' "/proc/$pid/maps" | while read -r from to; do
        echo "$from $(dd if="/proc/$pid/mem" bs=4096 skip=$((0x$from / 4096)) count=$(((0x$to - 0x$from) / 4096)) 2>/dev/null | sha256sum)"
    done
done | kind code
# The store, if there is one: names, with the guest's number (it has another one after it has moved) as N.
if command -v xenstore-ls >/dev/null && [ -e /proc/xen ]; then
    number=$(xl domid db1 2>/dev/null)
    xenstore-ls -f | sed 's/ = .*//' | sed "s,/${number:-none}\(/\|\$\),/N\1,g" | kind node
fi
echo "end	"
