# Derive source entries for Debian's suites from the machine's own apt entries.
#
# usage: awk -v suites="sid forky" -v out=DIRECTORY [-v type=deb] -f sources.awk FILE...
#
# FILEs are the machine's *.list (one line an entry) and *.sources (deb822).
# An entry is Debian's if it names a suite that Debian has and the component
# main; all others are other vendors' and are passed over. (What only looks like
# Debian's is found out by fetch, from the Origin in its signed Release file.)
# For each wanted suite and each address, one file appears in DIRECTORY, named
# NN-SUITE.list or NN-SUITE.sources, of type deb-src (or of -v type), with the options of the
# entry it came from: its keys, above all. Suites *-security take the addresses
# of the machine's security entries, all others those of its other entries.

BEGIN {
    release = "(oldoldstable|oldstable|stable|testing|unstable|experimental|sid|rc-buggy|" \
              "buster|bullseye|bookworm|trixie|forky|duke)"
    debian = "^" release "(-updates|-security|-backports|-backports-sloppy|-proposed-updates|/updates)?$"
    wanted = split(suites, suite, " ")
    if (type == "") type = "deb-src"
}

FNR == 1 { flush() }
{ sub(/\r$/, "") }

FILENAME ~ /\.list$/ { oneline($0); next }

# deb822: fields, continued on lines that begin with a blank; stanzas end at an
# empty line; lines that begin with # are comments anywhere.
/^#/         { next }
/^[ \t]*$/   { flush(); next }
/^[ \t]/     { value[fields] = value[fields] "\n" $0; next }
/:/          { fields++
               field[fields] = tolower(substr($0, 1, index($0, ":") - 1))
               label[fields] = substr($0, 1, index($0, ":"))
               value[fields] = substr($0, index($0, ":") + 1) }
END          { flush() }

# deb [option=value ...] address suite component...
function oneline(line,    options, word, n, i, comps) {
    sub(/#.*/, "", line)
    if (line !~ /^[ \t]*deb(-src)?[ \t]/) return
    options = ""
    if (match(line, /\[[^]]*\]/)) {
        options = substr(line, RSTART + 1, RLENGTH - 2)
        line = substr(line, 1, RSTART - 1) " " substr(line, RSTART + RLENGTH)
        # Those that would hide the index of sources.
        gsub(/(target|lang)[+-]?=[^ \t]*/, "", options)
        options = "[" options "] "
    }
    n = split(line, word, " ")
    comps = ""
    for (i = 4; i <= n; i++) comps = comps " " word[i]
    offer(word[2], word[3], comps, "list", options)
}

# One deb822 stanza is complete: offer each of its addresses.
function flush(    i, n, f, kept, uris, names, comps, on, types, uri) {
    on = 1
    kept = ""
    for (i = 1; i <= fields; i++) {
        f = field[i]
        if (f == "types") types = value[i]
        else if (f == "uris") uris = value[i]
        else if (f == "suites") names = value[i]
        else if (f == "components") comps = value[i]
        else if (f == "enabled") on = tolower(value[i]) !~ /no|false|without|off|disable|0/
        else if (f !~ /^(targets|languages)(-add|-remove)?$/) kept = kept label[i] value[i] "\n"
    }
    fields = 0
    if (!on || types !~ /deb/) return
    n = split(uris, uri, " ")
    for (i = 1; i <= n; i++) offer(uri[i], names, comps, "sources", kept)
}

# An entry of the machine: write what follows from it for the wanted suites.
function offer(uri, names, comps, kind, options,    name, n, i, main, plain, secure) {
    n = split(comps, name, " ")
    for (i = 1; i <= n; i++) if (name[i] == "main") main = 1
    if (!main || uri ~ /^cdrom:/) return
    n = split(names, name, " ")
    for (i = 1; i <= n; i++) {
        if (name[i] !~ debian) continue
        if (name[i] ~ /-security$|\/updates$/) secure = 1
        else plain = 1
    }
    for (i = 1; i <= wanted; i++) {
        if (suite[i] ~ /-security$/ ? !secure : !plain) continue
        if ((uri, suite[i], options) in written) continue
        written[uri, suite[i], options]
        put(sprintf("%s/%02d-%s.%s", out, ++count, suite[i], kind), uri, suite[i], kind, options)
    }
}

function put(file, uri, name, kind, options) {
    if (kind == "list") printf "%s %s%s %s main\n", type, options, uri, name > file
    else printf "Types: %s\nURIs: %s\nSuites: %s\nComponents: main\n%s", type, uri, name, options > file
    close(file)
}
