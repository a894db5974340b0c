#!/bin/sh
# finish.sh HOST BUNDLE [OPTION...]: build the engine of a prepared bundle on the board HOST, and bring the bundle back.
set -eu
host=$1 bundle=${2%/}
shift 2

there=$(ssh "$host" mktemp -d)
case $there in
/*) ;;
*) echo "finish.sh: a login on $host prints more than it should: $there" >&2 && exit 4 ;;
esac
trap 'ssh "$host" rm -rf "$there"' EXIT
tar -C "$bundle" -cf - . | ssh "$host" tar -C "$there" -xf -
ssh "$host" edgecompile build "$there" --no-bench "$@" >&2

rm -rf "$bundle.new"
mkdir "$bundle.new"
ssh "$host" tar -C "$there" -cf - . | tar -C "$bundle.new" -xf -
rm -rf "$bundle"
mv "$bundle.new" "$bundle"
