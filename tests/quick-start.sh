#!/bin/bash
# A newcomer's path through docs/quick-start.md: runs the page's own commands, read from the page each time, so that they cannot differ.
#
#   tests/quick-start.sh PART...          runs parts, by their headings, in the order given
#   tests/quick-start.sh --list           shows what would run, and where: WHERE<tab>COMMAND
#
# Commands with the prompt `$` run here, in the checkout; those with `#` on each machine that the text before their block names, as root by
# ssh: "the guest" is db1, "both hosts" are host-a and host-b. What these names are is ssh's configuration to say. The first command that
# fails ends it. Questions are answered with yes: there is nobody to ask. A table of commands that cannot be run, each with its reason, is below.
set -euo pipefail
cd "$(dirname "$0")/.."
page=docs/quick-start.md

# Commands that are not run: none at present. COMMAND<tab>REASON, one a line.
not_run=''

# The commands of the page: PART<tab>WHERE<tab>COMMAND. A command whose machine the text does not name has WHERE "?".
commands() {
  awk '
    /^```/ { if (inside) { inside = 0; text = "" } else if ($0 == "```console") inside = 1; else { print "unexpected block: " $0 >"/dev/stderr"; exit 3 } next }
    !inside && /^#/ { sub(/^#+ */, ""); part = $0; text = ""; next }
    !inside { text = text " " $0; next }
    /^\$ / { print part "\there\t" substr($0, 3); next }
    /^# / {
      where = ""
      if (text ~ /[Oo]n both hosts/) where = "host-a host-b"
      else if (text ~ /[Ii]n the guest/) where = "db1"
      else if (match(text, /[Oo]n `host-[ab]`[^`]*$/)) where = substr(text, RSTART + 4, 6)
      print part "\t" (where == "" ? "?" : where) "\t" substr($0, 3)
      next
    }
    { print "neither a command nor a prompt: " $0 >"/dev/stderr"; exit 3 }
  ' "$page"
}

all=$(commands)
if grep -q $'\t?\t' <<<"$all"; then
  echo "$page does not say where these run:" >&2
  grep $'\t?\t' <<<"$all" >&2
  exit 3
fi
if [ "${1:-}" = --list ]; then
  echo "$all"
  exit 0
fi
[ $# -gt 0 ] || { echo "which parts? $(cut -f1 <<<"$all" | uniq | tr '\n' ';')" >&2; exit 2; }

for part in "$@"; do
  if ! cut -f1 <<<"$all" | grep -qxF "$part"; then
    echo "$page has no part \"$part\" with commands" >&2
    exit 2
  fi
  while IFS=$'\t' read -r of where command <&3; do
    [ "$of" = "$part" ] || continue
    if reason=$(grep -F "$command"$'\t' <<<"$not_run"); then
      echo "== not run: $command (${reason#*$'\t'})"
      continue
    fi
    for machine in $where; do
      echo "== $machine: $command"
      if [ "$machine" = here ]; then
        bash -euo pipefail -c "$command" <<<"y"
      else
        ssh -o BatchMode=yes "root@$machine" "$command" <<<"y"
      fi
    done
  done 3<<<"$all"
done
echo "== done: $*"
