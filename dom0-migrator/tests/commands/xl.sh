#!/bin/bash
# Stands in xl's place: the same steps in the same order on the same descriptors, with the domain's memory a file of zeros.
# XS is the directory that the test's xenstore serves; FAULT names the step that goes wrong.
set -u
domains="$XS/local/domain"

die() { echo "$1" >&2; exit 1; }

case "$1" in
migrate)
    transport="${*: -1}"
    id="${*: -2:1}"
    name=$(cat "$domains/$id/name")
    coproc LINK { exec sh -c "$transport"; }
    read -r banner <&"${LINK[0]}" || die "migration receiver stream contained unexpected data"
    [ "$banner" = "xl migration receiver" ] || die "unexpected banner $banner"
    echo "Saving to migration stream new xl format (info 0x3/0x0/0)" >&2
    echo "$name" >&"${LINK[1]}"
    [ "${FAULT:-}" = source-dies ] && kill -KILL $$
    head -c 1000000 /dev/zero >&"${LINK[1]}" || die "libxl: error: broken pipe"
    read -r ready <&"${LINK[0]}" || die "Migration failed, resuming at sender."
    echo "migration sender: Target has acknowledged transfer." >&2
    printf '%s--migratedaway' "$name" > "$domains/$id/name"
    echo go >&"${LINK[1]}"
    if ! read -r report <&"${LINK[0]}"; then
        echo "** Migration failed during final handshake **" >&2
        die "Domain state is now undefined !"
    fi
    rm -r "${domains:?}/$id"
    echo "Migration successful." >&2
    ;;
migrate-receive)
    echo "migration target: Ready to receive domain." >&2
    [ "${FAULT:-}" = target-mute ] && exec sleep 1000
    echo "xl migration receiver"
    read -r name || die "no configuration"
    mkdir -p "$domains/7"
    printf '%s--incoming' "$name" > "$domains/7/name"
    [ "${FAULT:-}" = target-dies ] && kill -KILL $$
    [ "${FAULT:-}" = target-waits ] && exec sleep 1000
    length=$(head -c 1000000 | wc -c)
    [ "$length" = 1000000 ] || { rm -r "$domains/7"; die "migration target: Domain creation failed (code -3)."; }
    echo "migration target: Transfer complete, requesting permission to start domain." >&2
    echo ready
    [ "${FAULT:-}" = target-dies-late ] && kill -KILL $$
    read -r permission || die "no permission"
    printf '%s' "$name" > "$domains/7/name"
    echo started
    ;;
destroy)
    rm -r "${domains:?}/$2"
    ;;
*)
    die "xl $*: not needed so far"
    ;;
esac
