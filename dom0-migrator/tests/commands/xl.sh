#!/bin/bash
# Stands in xl's place: the same steps and words in the same order on the same descriptors, with the domain's memory a file of
# zeros. XS is the directory that the test's xenstore serves, where each domain also has its state; FAULT names the step that goes
# wrong. At a step that is held up, xl waits
# until it is killed or the test is over.
set -u
domains="$XS/local/domain"
ready='domain received, ready to unpause'
go='domain is yours, you are cleared to unpause'
report='my copy unpause results are as follows'

die() { echo "$1" >&2; exit 1; }
fault() { [ "${FAULT:-}" = "$1" ]; }
state() { printf '%s' "$2" > "$domains/$1/state"; }
hold() { while [ -d "$XS" ]; do sleep 0.05; done; exit 1; }
resume() {
    printf '%s' "$name" > "$domains/$id/name"
    state "$id" running
    die "$1"
}

case "$1" in
migrate)
    transport="${*: -1}"
    id="${*: -2:1}"
    name=$(cat "$domains/$id/name")
    trap '' PIPE
    coproc LINK { exec sh -c "$transport"; }
    # Copies of them: bash closes its own when the transport ends.
    exec {in}<&"${LINK[0]}" {out}>&"${LINK[1]}"
    eval "exec ${LINK[1]}>&-"
    read -r banner <&"$in" || die "migration receiver stream contained unexpected data"
    [ "$banner" = "xl migration receiver ready, send binary domain data." ] || die "unexpected banner $banner"
    echo "Saving to migration stream new xl format (info 0x3/0x0/0)" >&2
    echo "$name" >&"$out"
    fault source-dies && kill -KILL $$
    state "$id" suspended
    fault source-dies-suspended && kill -KILL $$
    head -c 1000000 /dev/zero >&"$out" || resume "libxl: error: broken pipe"
    read -r -d '' said <&"$in" && [ "$said" = "$ready" ] || resume "Migration failed, resuming at sender."
    echo "migration sender: Target has acknowledged transfer." >&2
    printf '%s--migratedaway' "$name" > "$domains/$id/name"
    fault source-dies-before-go && kill -KILL $$
    printf '%s\0' "$go" >&"$out"
    fault source-dies-after-go && kill -KILL $$
    if ! { read -r -d '' said <&"$in" && [ "$said" = "$report" ]; }; then
        echo "** Migration failed during final handshake **" >&2
        die "Domain state is now undefined !"
    fi
    status=$(head -c 1 <&"$in" | od -An -tu1 | tr -d ' ')
    if [ "$status" != 0 ]; then
        read -r -d '' said <&"$in" && [ "$said" = "$go" ] || die "no permission to resume"
        resume "Migration failed due to problems at target."
    fi
    rm -r "${domains:?}/$id"
    echo "Migration successful." >&2
    ;;
migrate-receive)
    trap '' PIPE
    echo "migration target: Ready to receive domain." >&2
    fault target-mute && exec sleep 1000
    echo "xl migration receiver ready, send binary domain data."
    read -r name || die "no configuration"
    mkdir -p "$domains/7"
    state 7 paused
    printf '%s--incoming' "$name" > "$domains/7/name"
    fault target-dies && kill -KILL $$
    fault target-waits && exec sleep 1000
    length=$(head -c 1000000 | wc -c)
    [ "$length" = 1000000 ] || { rm -r "$domains/7"; die "migration target: Domain creation failed (code -3)."; }
    echo "migration target: Transfer complete, requesting permission to start domain." >&2
    fault target-holds-ready && hold
    fault target-says-nonsense && { echo "hello"; exec sleep 1000; }
    fault target-waits-for-word && while [ ! -e "$XS/../go-on" ]; do [ -d "$XS" ] || exit 1; sleep 0.05; done
    printf '%s\0' "$ready"
    fault target-dies-ready && kill -KILL $$
    if read -r -d '' said && [ "$said" = "$go" ]; then
        fault target-dies-go && kill -KILL $$
        fault target-holds-go && hold
        fault target-waits-with-go && while [ ! -e "$XS/../go-on" ]; do [ -d "$XS" ] || exit 1; sleep 0.05; done
        status='\003'
        if ! fault target-cannot-start; then
            printf '%s' "$name" > "$domains/7/name"
            state 7 running
            status='\000'
            fault target-dies-started && kill -KILL $$
        fi
    else
        status='\001'
    fi
    printf '%s\0' "$report" || exit 1
    printf "$status" || exit 1
    if [ "$status" != '\000' ]; then
        echo "migration target: Failure, destroying our copy." >&2
        rm -r "$domains/7"
        printf '%s\0' "$go"
    fi
    ;;
info)
    echo "host                   : a-host"
    echo "xen_commandline        : placeholder dom0_mem=1024M"
    echo "total_memory           : 4096"
    echo "free_memory            : $(cat "$XS/free_memory" 2>/dev/null || echo 2048)"
    ;;
destroy)
    rm -r "${domains:?}/$2"
    ;;
rename)
    printf '%s' "$3" > "$domains/$2/name"
    ;;
unpause | resume)
    state "$2" running
    ;;
*)
    die "xl $*: not needed so far"
    ;;
esac
