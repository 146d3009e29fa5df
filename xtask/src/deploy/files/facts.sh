# What a machine is: one `key=value` a line. Changes nothing.
say() { printf '%s=%s\n' "$1" "$2"; }
say uid "$(id -u)"
ID='' PRETTY_NAME=''
[ -r /etc/os-release ] && . /etc/os-release
say os "${PRETTY_NAME:-unknown}"
if command -v apt-get >/dev/null 2>&1 && command -v dpkg-query >/dev/null 2>&1; then say apt yes; else say apt no; fi
say architecture "$(dpkg --print-architecture 2>/dev/null || uname -m)"
kernel=$(uname -r)
say kernel "$kernel"
if [ -e "/lib/modules/$kernel/build/Makefile" ]; then say headers here
elif apt-cache show "linux-headers-$kernel" >/dev/null 2>&1; then say headers available
else say headers none; fi
if [ -r /sys/hypervisor/version/major ]; then
    say xen "$(cat /sys/hypervisor/version/major).$(cat /sys/hypervisor/version/minor)"
fi
if grep -q control_d /proc/xen/capabilities 2>/dev/null || grep -qx 00000000-0000-0000-0000-000000000000 /sys/hypervisor/uuid 2>/dev/null
then say dom0 yes; else say dom0 no; fi
say free_kib "$(df -Pk /usr /var /tmp | awk 'NR > 1 { if (least == "" || $4 < least) least = $4 } END { print least }')"
for package in poolskip-guest poolskip-dom0; do
    state=$(dpkg-query -W -f='${db:Status-Abbrev} ${Version}' "$package" 2>/dev/null) && say "state_${package#poolskip-}" "$state"
    [ -r "/var/lib/poolskip-deploy/$package.sha256" ] && say "hash_${package#poolskip-}" "$(cat "/var/lib/poolskip-deploy/$package.sha256")"
done
[ -e /var/lib/poolskip-deploy ] && say record yes
if [ -d /sys/module/poolskip ]; then say module yes; else say module no; fi
if [ -d /run/systemd/system ]; then say systemd yes; else say systemd no; fi
if [ -n "$(dpkg --audit 2>/dev/null)" ]; then say dpkg broken; else say dpkg whole; fi
for process in /proc/[0-9]*; do
    case "$(cat "$process/comm" 2>/dev/null)" in
    mysqld | mariadbd)
        # Its number and when it began: a number alone may have been given anew.
        say mysqld "${process#/proc/}@$(sed 's/.*) //' "$process/stat" 2>/dev/null | cut -d' ' -f20)"
        ;;
    esac
done
say end yes
