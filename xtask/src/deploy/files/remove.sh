# $1: the package's name. Removes it, and what the deployment brought with it, but for what others need by now.
set -e
package=$1
directory=/var/lib/poolskip-deploy
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
here=''
for name in $package $(cat "$directory/brought" 2>/dev/null); do
    case " $here " in *" $name "*) continue ;; esac
    state=$(dpkg-query -W -f='${db:Status-Abbrev}' "$name" 2>/dev/null) || continue
    case "$state" in un*) ;; *) here="$here $name" ;; esac
done
# What would go beside those named.
others() {
    apt-get -s -q purge "$@" | sed -n 's/^Purg \([^ ]*\) .*/\1/p' | while read -r name; do
        case " $here " in *" $name "*) ;; *) echo "$name" ;; esac
    done
}
while :; do
    kept=''
    for name in $here; do
        if [ "$name" != "$package" ] && [ -n "$(others "$name")" ]; then
            echo "$name stays: others need it by now"
            kept=$name
            break
        fi
    done
    [ -n "$kept" ] || break
    here=$(for name in $here; do [ "$name" = "$kept" ] || printf ' %s' "$name"; done)
done
[ -z "$here" ] || apt-get -q -y -o DPkg::Lock::Timeout=120 purge $here
rm -rf "$directory"
