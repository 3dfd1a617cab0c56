# Shared by the scripts in this directory, which source it. It sets $top (the
# repository) and $here (this directory), and defines functions; it runs nothing.
# Functions in ( ) instead of { } keep their variables to themselves.
#
# Words used throughout:
#   BUILD    the build directory (`make BUILD=...`), `build` by default
#   upstream BUILD/upstream: upstream's files after Debian's patches, never compiled
#   tree     BUILD/redis: upstream, our series applied, our files linked in
#   state    BUILD/state: what was fetched and assembled, one file a fact:
#              fetched      which tarballs, with their checksums
#              upstream.id  identity of what BUILD/upstream was made from
#              tree.id      identity of what BUILD/redis was made from
#              tree.sums    checksum of each of its files as it was assembled
#              bodies       checksum of each patch's body as it was applied

LC_ALL=C
export LC_ALL
here=$(cd "$(dirname "$0")" && pwd -P)
top=$(cd "$here/../.." && pwd -P)
self=${0##*/}

say() { printf '%s: %s\n' "$self" "$*"; }
die() { printf '%s: %s\n' "$self" "$*" >&2; exit 1; }

# need PROGRAM PACKAGE: stop unless PROGRAM can be run.
need() {
    command -v "$1" >/dev/null 2>&1 ||
        die "the program $1 is missing; install it (Debian: the package $2) and run make again."
}

sha256() { sha256sum "$1" | cut -d ' ' -f 1; }

# fact NAME FILE: the rest of the line of FILE that begins with NAME.
fact() { awk -v name="$1" '$1 == name { sub(/^[^ ]+ */, ""); print; exit }' "$2"; }

# tarball BUILD FACT: the file that was fetched to BUILD; where BUILD was since moved or
# copied, the one in its download directory.
tarball() (
    file=$(fact "$2" "$1/state/fetched")
    [ -z "$file" ] || [ -f "$file" ] || file=$1/download/${file##*/}
    printf '%s\n' "$file"
)

# The patches of our series, in order; and the files that a patch owns.
series() { sed -e 's/#.*//' -e 's/[ 	]*$//' -e '/^$/d' "$here/patches/series"; }
patch_files() { sed -e '/^--- /,$d' -n -e 's/^Files:[ 	]*//p' "$1" | tr -s ' \t' '\n\n' | sed '/^$/d'; }
patch_header() { sed '/^--- /,$d' "$1"; }
patch_body() { sed -n '/^--- /,$p' "$1"; }

# sums DIRECTORY: "SHA-256  ./PATH" of every regular file below it.
sums() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }

# sums_of LIST DIRECTORY: the same for those paths of LIST that exist.
sums_of() { (cd "$2" && tr '\n' '\0' | xargs -0 sha256sum 2>/dev/null || true) <"$1"; }

# paths SUMS...: the paths in lists of checksums.
paths() { cut -c 67- "$@" | sort -u; }

# body_sums: "SHA-256 PATCH" of the body of each patch of the series.
body_sums() {
    series | while read -r name; do
        printf '%s %s\n' "$(patch_body "$here/patches/$name" | sha256sum | cut -d ' ' -f 1)" "$name"
    done
}

# check_series: stop if the series names a patch that is not there.
check_series() {
    series | while read -r name; do
        [ -f "$here/patches/$name" ] ||
            die "patches/series names $name, which is missing; restore it or take it out of the series."
    done
}

# series_id: one checksum over all patches of the series, in their order.
series_id() {
    series | while read -r name; do sha256sum <"$here/patches/$name"; done |
        sha256sum | cut -d ' ' -f 1
}

# apply_series DIRECTORY: apply our patches there; offsets are fine, fuzz is not.
apply_series() {
    series | while read -r name; do
        [ -n "$(patch_body "$here/patches/$name" | head -n 1)" ] || continue
        patch_log=$(patch -d "$1" -p1 -f -s -F0 -r - --no-backup-if-mismatch \
            <"$here/patches/$name" 2>&1) || {
            printf '%s\n' "$patch_log" >&2
            die "the patch deps/redis/patches/$name does not apply to this upstream without fuzz; correct it, or fetch the upstream version it was made for."
        }
    done
}

# relative FROM TO: how directory TO is reached from directory FROM.
relative() (
    from=$(cd "$1" && pwd -P) to=$(cd "$2" && pwd -P) up=
    while case $to/ in "$from"/*) false ;; *) true ;; esac; do
        from=${from%/*} up=../$up
    done
    down=${to#"$from"}
    printf '%s\n' "$up${down#/}"
)

# place_ours DIRECTORY link|copy: put our files where upstream's build and
# tests look for them; links that lost their file go, with what was made of it.
place_ours() {
    place "$1" "$2" src src '*.[ch]'
    place "$1" "$2" src src 'OPERATING.md'
    place "$1" "$2" src/commands src/commands '*.json'
    place "$1" "$2" tests/unit/cluster/slot-migration tests/unit/cluster/slot-migration '*.tcl'
    place "$1" "$2" tests/support tests/support 'slot_migration.tcl'
}

# place DIRECTORY link|copy FROM TO PATTERN
place() (
    [ -d "$top/$3" ] || [ -d "$1/$4" ] || return 0
    mkdir -p "$1/$4"
    for gone in "$1/$4"/$5; do
        if [ -L "$gone" ] && [ ! -e "$gone" ]; then
            rm "$gone"
            forget "$1/src" "${gone##*/}"
        fi
    done
    [ -d "$top/$3" ] || return 0
    way=$(relative "$1/$4" "$top/$3")
    for ours in "$top/$3"/$5; do
        [ -f "$ours" ] || continue
        name=${ours##*/}
        put=$1/$4/$name
        if [ -L "$put" ] && [ "$put" -ef "$ours" ]; then continue; fi
        if [ -e "$put" ] && [ ! -L "$put" ]; then
            die "$3/$name has the name of a file that is in the assembled tree already; rename ours."
        fi
        rm -f "$put"
        case $2 in
            link) ln -s "$way/$name" "$put" ;;
            copy) cp "$ours" "$put" ;;
        esac
    done
)

# forget SRC NAME: drop what was compiled from our file NAME, which is gone:
# its dependency files would stop make, its object would stay linked in.
forget() {
    for deps in "$1"/*.d; do
        if [ -f "$deps" ] && grep -q "[ /]$2\\( \\|\$\\)" "$deps"; then
            rm -f "$deps" "${deps%.d}.o"
        fi
    done
    rm -f "$1/Makefile.dep" "$1"/redis-server
}

# lost_edits OLD NEW CURRENT: the paths whose file in the tree is neither what
# was assembled (OLD) nor what will be (NEW): an assembly would lose the work.
lost_edits() {
    awk '
        FILENAME == ARGV[1] { old[substr($0, 67)] = $1; all[substr($0, 67)]; next }
        FILENAME == ARGV[2] { new[substr($0, 67)] = $1; all[substr($0, 67)]; next }
                            { cur[substr($0, 67)] = $1 }
        END {
            for (path in all)
                if (cur[path] != old[path] && cur[path] != new[path])
                    print substr(path, 3)
        }' "$1" "$2" "$3" | sort
}
