#!/bin/sh
# Installs Poolskip @VERSION@ without a package manager, and removes it again.
#
#   ./install.sh guest|dom0               beside a running mysqld, or on a Xen host
#   ./install.sh --remove guest|dom0      all that this script has installed; configuration that was changed is kept
#   ./install.sh --purge guest|dom0       the configuration too
#
#   --prefix DIRECTORY   where programs, man pages and completions go [/usr/local]
#   --root DIRECTORY     install into another system's root; nothing is built, started or stopped
#
# Exit codes: 0 done, 1 failed (what was installed by then is on record, and removed by --remove), 2 nothing was begun.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
action=install role='' prefix=/usr/local root=''

say() { echo "install.sh: $*"; }
refuse() {
    echo "install.sh: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case "$1" in
    guest | dom0) role=$1 ;;
    --remove) action=remove ;;
    --purge) action=purge ;;
    --prefix)
        [ $# -gt 1 ] || refuse "--prefix wants a directory"
        prefix=$2
        shift
        ;;
    --root)
        [ $# -gt 1 ] || refuse "--root wants a directory"
        root=${2%/}
        shift
        ;;
    -h | --help)
        sed -n '2,/^set/{s/^# \{0,1\}//;/^set/d;p}' "$0"
        exit 0
        ;;
    *) refuse "$1: not known; --help says what is" ;;
    esac
    shift
done
[ -n "$role" ] || refuse "guest or dom0? --help says more"
case "$prefix" in /*) ;; *) refuse "--prefix $prefix: an absolute path is wanted" ;; esac
[ "$(id -u)" = 0 ] || refuse "this needs root"

record="$root$prefix/share/poolskip/$role.installed"
live() { [ -z "$root" ]; }
has() { command -v "$1" >/dev/null 2>&1; }
booted() { live && [ -d /run/systemd/system ]; }

units() {
    if [ "$role" = guest ]; then echo guest-probe.service; else echo poolskip-receive.socket poolskip-receive.service; fi
}


put() { # FROM TO MODE
    mkdir -p "$(dirname "$root$2")"
    # Under its name it is whole or not at all.
    cp "$1" "$root$2.poolskip-new"
    case "$2" in
    */systemd/system/*) sed "s#/usr/local/sbin/#$prefix/sbin/#" "$1" >"$root$2.poolskip-new" ;;
    esac
    chmod "$3" "$root$2.poolskip-new"
    mv "$root$2.poolskip-new" "$root$2"
}

forget_files() { # KEEP-CHANGED-CONFIGURATION
    [ -f "$record" ] || return 0
    kept="$record.kept"
    : >"$kept"
    while read -r hash path; do
        file="$root$path"
        [ -f "$file" ] || continue
        case "$path" in
        /etc/poolskip/*)
            if [ "$1" = yes ] && [ "$(sha256sum <"$file" | cut -d' ' -f1)" != "$hash" ]; then
                say "$path was changed, and is kept"
                printf '%s  %s\n' "$hash" "$path" >>"$kept"
                continue
            fi
            ;;
        esac
        rm -f "$file"
        directory=$(dirname "$path")
        # Directories that are empty now and no part of every system.
        while case "$directory" in */poolskip* | "$prefix"/share/?*) true ;; *) false ;; esac do
            rmdir "$root$directory" 2>/dev/null || break
            directory=$(dirname "$directory")
        done
    done <"$record"
    # What was kept stays on record, for --purge.
    mv "$kept" "$record"
    if [ ! -s "$record" ]; then
        rm -f "$record"
        rmdir "$(dirname "$record")" 2>/dev/null || true
    fi
}

remove() { # KEEP
    [ -f "$record" ] || say "nothing of $role is on record in $record"
    if live && [ "$role" = dom0 ] && [ -x "$prefix/sbin/dom0-migrator" ]; then
        if ! "$prefix/sbin/dom0-migrator" status >/dev/null 2>&1; then
            refuse "a migration was cut off and is not settled: 'dom0-migrator resolve' first"
        fi
        if "$prefix/sbin/dom0-migrator" status --json | grep -q '"active": true'; then
            refuse "a migration runs: wait for it, or 'dom0-migrator cancel' it"
        fi
        "$prefix/sbin/dom0-migrator" disable all
    fi
    if booted; then
        for unit in $(units); do
            systemctl disable --now "$unit" 2>/dev/null || true
        done
    fi
    if live && [ "$role" = guest ]; then
        if [ -d /sys/module/poolskip ]; then modprobe -r poolskip || say "the module is in use, and stays until the next boot"; fi
        if has dkms && [ -n "$(dkms status -m poolskip -v @VERSION@)" ]; then dkms remove -m poolskip -v @VERSION@ --all; fi
    fi
    forget_files "$1"
    if [ "$1" = no ]; then
        if [ "$role" = dom0 ]; then
            rm -rf "$root/etc/poolskip/certificates" "$root/etc/poolskip/certificates.pending" "$root/etc/poolskip/certificates.new" \
                "$root/etc/poolskip/authority" "$root/var/lib/poolskip"
        else
            rm -rf "$root/etc/poolskip/catalogue.d"
        fi
    fi
    rmdir "$root/etc/poolskip/catalogue.d" "$root/etc/poolskip/certificates" 2>/dev/null || true
    rmdir "$root/etc/poolskip" 2>/dev/null || true
    if booted; then systemctl daemon-reload; fi
}

install_all() {
    from="$here/$role"
    [ -d "$from" ] || refuse "$from is not here: run it in the directory that the tarball makes"
    if live && [ "$role" = dom0 ] && [ ! -e /sys/hypervisor/version/major ]; then
        say "this machine does not run Xen now; nothing can be migrated until it does"
    fi
    for program in "$from"/prefix/sbin/*; do
        missing=$(ldd "$program" 2>&1 | grep 'not found' || true)
        if live && [ -n "$missing" ]; then refuse "libraries are missing:$missing"; fi
    done
    mkdir -p "$(dirname "$record")"
    # What an earlier version had and this one has not goes; the record is begun anew.
    old=''
    if [ -f "$record" ]; then
        old=$(mktemp)
        cp "$record" "$old"
    fi
    : >"$record.new"
    (cd "$from" && find prefix root -type f | sort) | while read -r path; do
        case "$path" in
        prefix/*) to="$prefix/${path#prefix/}" ;;
        root/*) to="/${path#root/}" ;;
        esac
        mode=644
        case "$path" in prefix/sbin/*) mode=755 ;; esac
        hash=''
        case "$to" in
        /etc/poolskip/*)
            if [ -e "$root$to" ]; then
                hash=$(sha256sum <"$from/$path" | cut -d' ' -f1)
                if [ "$(sha256sum <"$root$to" | cut -d' ' -f1)" != "$hash" ]; then say "$to is there already, and is kept"; fi
            fi
            ;;
        esac
        if [ -z "$hash" ]; then
            put "$from/$path" "$to" "$mode"
            hash=$(sha256sum <"$root$to" | cut -d' ' -f1)
        fi
        # On the old record too: should this be broken off, --remove knows of it.
        printf '%s  %s\n' "$hash" "$to" | tee -a "$record.new" >>"$record"
    done
    mv "$record.new" "$record"
    if [ -n "$old" ]; then
        while read -r _ path; do
            grep -qF "  $path" "$record" || rm -f "$root$path"
        done <"$old"
        rm -f "$old"
    fi
    [ "$role" = guest ] || mkdir -p -m 700 "$root/etc/poolskip/certificates"
    if [ "$role" = guest ]; then mkdir -p "$root/etc/poolskip/catalogue.d"; fi
    if ! live; then return 0; fi
    if booted; then systemctl daemon-reload; fi
    if [ "$role" = guest ]; then
        if ! has dkms; then
            echo "install.sh: there is no dkms here: install it with gcc, make and the headers of $(uname -r), then run this again" >&2
            exit 1
        fi
        if [ -n "$(dkms status -m poolskip -v @VERSION@)" ]; then dkms remove -m poolskip -v @VERSION@ --all; fi
        dkms add -m poolskip -v @VERSION@
        if [ ! -e "/lib/modules/$(uname -r)/build" ]; then
            echo "install.sh: there are no headers of $(uname -r): install them, then run this again" >&2
            exit 1
        fi
        dkms install -m poolskip -v @VERSION@
        modprobe poolskip
        if booted; then systemctl enable --now guest-probe.service; fi
        say "done; 'guest-probe doctor' looks at the mysqld that runs here"
    else
        say "done; next: 'dom0-migrator pair OTHER-HOST', 'systemctl enable --now poolskip-receive.socket', 'dom0-migrator doctor'"
    fi
}

case "$action" in
install) install_all ;;
remove) remove yes ;;
purge) remove no ;;
esac
