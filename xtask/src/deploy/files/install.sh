# $1: the package's name. Its file is /var/lib/poolskip-deploy/NAME.deb already. What apt brings along is written down first, so that
# all of it can go again, however this ends.
set -e
package=$1
directory=/var/lib/poolskip-deploy
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
# An installation that was broken off before.
dpkg --configure -a || true
brought=$(apt-get -s -q install --no-install-recommends "$directory/$package.deb" $2 | sed -n 's/^Inst \([^ ]*\) (.*/\1/p')
for name in $brought; do
    grep -qx "$name" "$directory/brought" 2>/dev/null || echo "$name" >>"$directory/brought"
done
apt-get -q -y -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confold install --no-install-recommends --reinstall "$directory/$package.deb" $2
sha256sum <"$directory/$package.deb" | cut -d' ' -f1 >"$directory/$package.sha256"
rm "$directory/$package.deb"
