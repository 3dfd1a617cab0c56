# benchlib.tcl -- what the benches share: a cluster on loopback, the load, the numbers.
#
# A bench sets the array `opt` (with `replicas`, maybe `masters`, and what start_load
# uses), calls read_options and prepare, and at its end clean. `redisBin` may be set to
# another server's directory before each start_cluster; stop_cluster ends that.
#
# SPDX-License-Identifier: AGPL-3.0-only

set top [file dirname [file dirname [file normalize [info script]]]]
set ::tlsdir ""
set servers {}      ;# of {pid port connection}
set load ""
set work ""
set serverOptions {--cluster-node-timeout 5000}
set withUs {setpriv --pdeathsig TERM}     ;# ends when we do, however that is
set tool [file tail $argv0]

proc usage {} {
    set f [open $::argv0]
    foreach line [lrange [split [read $f] \n] 1 end] {
        if {![string match "#*" $line] || [string match "*SPDX*" $line]} break
        puts [string range $line 2 end]
    }
    close $f
}

proc die {text {status 2}} {
    puts stderr "$::tool: $text"
    clean
    exit $status
}

proc clean {} {
    if {$::load ne ""} {
        catch {exec kill [pid $::load]}
        catch {close $::load}
        set ::load ""
    }
    stop_cluster
    if {$::work ne ""} {file delete -force $::work}
    if {[info exists ::aside]} {file delete -force $::aside}
    set ::work ""
}

proc stop_cluster {} {
    foreach server $::servers {
        catch {[lindex $server 2] close}
        catch {exec kill [lindex $server 0]}
    }
    foreach server $::servers {
        set pid [lindex $server 0]
        for {set i 0} {$i < 100 && ![catch {exec kill -0 $pid}]} {incr i} {after 50}
        catch {exec kill -9 $pid}
    }
    set ::servers {}
}

proc wait_for {seconds what condition} {
    set until [expr {[clock milliseconds]+$seconds*1000}]
    while {![uplevel 1 [list expr $condition]]} {
        if {[clock milliseconds] > $until} {die "$what: not within $seconds s"}
        after 20
    }
}

# ---- the cluster ----

set nextPort [expr {21000 + [pid]%5000}]

# It finds its port free, or ends: then the next is tried.
proc start_server {} {
    while 1 {
        set port [incr ::nextPort]
        if {$port > 31000} {die "no free ports were found"}
        set dir $::work/$port
        file mkdir $dir
        set pid [exec {*}$::withUs $::redisBin/redis-server --port $port --bind 127.0.0.1 --dir $dir --cluster-enabled yes \
            {*}$::serverOptions --save "" --appendonly no >& $dir/log &]
        lappend ::servers [list $pid $port]
        for {set i 0} {$i < 500 && ![catch {exec kill -0 $pid}]} {incr i} {
            # The answer must be from our process, not from another's server.
            if {![catch {set c [redis 127.0.0.1 $port]; $c info server} info] &&
                [regexp "process_id:(\\d+)" $info -> of] && $of == $pid} {
                lset ::servers end [list $pid $port $c]
                return
            }
            after 20
        }
        catch {exec kill $pid}
        set ::servers [lrange $::servers 0 end-1]
        set f [open $dir/log]
        set log [read $f]
        close $f
        if {![string match "*Address already in use*" $log]} {die "a server does not start: [string range $log end-500 end]"}
    }
}

proc node {i} {lindex $::servers $i 2}
proc port {i} {lindex $::servers $i 1}
proc info_field {i name} {
    expr {[regexp "$name:(\[^\r\]*)" [[node $i] cluster info] -> value] ? $value : ""}
}

proc info_of {i name} {
    regexp "$name:(\[^\r\]*)" [[node $i] info everything] -> value
    return $value
}

proc start_cluster {} {
    set masters [expr {[info exists ::opt(masters)] ? $::opt(masters) : 3}]
    set n [expr {$masters*(1+$::opt(replicas))}]
    set addresses {}
    for {set i 0} {$i < $n} {incr i} {
        start_server
        lappend addresses 127.0.0.1:[port $i]
    }
    if {[catch {exec $::redisBin/redis-cli --cluster create {*}$addresses --cluster-replicas $::opt(replicas) --cluster-yes} text]} {
        die "the cluster could not be created: $text"
    }
    for {set i 0} {$i < $n} {incr i} {
        wait_for 30 "node $i is ready" {[info_field $i cluster_state] eq "ok"}
    }
    for {set i $masters} {$i < $n} {incr i} {
        wait_for 60 "the replica $i is linked" {[string match *master_link_status:up* [[node $i] info replication]]}
    }
}

proc epoch {} {
    set most 0
    for {set i 0} {$i < [llength $::servers]} {incr i} {
        set most [expr {max($most,[info_field $i cluster_current_epoch])}]
    }
    return $most
}

# ---- the load ----

proc start_load {slots} {
    set ::load [open |[list {*}$::withUs $::slotload run 127.0.0.1:[port 0] --slots 0-[expr {$slots-1}] --rate $::opt(rate) \
        --read-share [expr {[info exists ::opt(read-share)] ? $::opt(read-share) : 0}] --multi-share 0 --moving-share $::opt(moving-share) --keys 1000 --warmup 2 \
        --status $::work/status --laps $::work/laps --flat --output $::work/report 2> $::work/slotload.log] w]
    fconfigure $::load -buffering line
    file delete $::work/status
    wait_for 60 "the load" {[file exists $::work/status] || [catch {puts -nonewline $::load ""; flush $::load}]}
    after 7000      ;# 2 s to warm up, 5 s to be compared with: the phase "before"
}

proc stop_load {} {
    puts $::load stop
    set status [catch {close $::load} text options]
    set ::load ""
    if {$status && [lindex [dict get $options -errorcode] 0] eq "CHILDSTATUS"} {
        set status [lindex [dict get $options -errorcode] 2]
    }
    if {$status != 0 && $status != 2} {
        die "the load generator failed: [exec cat $::work/slotload.log]"
    }
    set f [open $::work/report]
    set ::report {}
    foreach line [split [read $f] \n] {
        if {[regexp {^(\S+) (.*)$} $line -> name value]} {dict set ::report $name $value}
    }
    close $f
    return $status
}

proc reported {name} {
    expr {[dict exists $::report $name] ? [dict get $::report $name] : 0}
}

# ---- the numbers ----

proc percentile {sorted p} {
    lindex $sorted [expr {max(0,int(ceil($p/100.0*[llength $sorted]-1e-6))-1)}]
}

proc ms {us} {format %.2f [expr {$us/1000.0}]}

proc row {name values} {
    set sorted [lsort -integer $values]
    set cells {}
    foreach p {50 99 99.9 100} {lappend cells [format %9s [ms [percentile $sorted $p]]]}
    puts [format "  %-46s%s" $name [join $cells ""]]
}

proc reported_row {name prefix} {
    set cells {}
    foreach p {p50_us p99_us p999_us max_us} {lappend cells [format %9s [ms [reported $prefix.$p]]]}
    puts [format "  %-46s%s" $name [join $cells ""]]
}

# ---- the beginning ----

# argv into `opt`.
proc read_options {} {
    foreach {name value} $::argv {
        if {$name in {-h --help}} {usage; exit 0}
        set name [string range $name 2 end]
        if {![info exists ::opt($name)] || $value eq ""} {
            puts stderr "$::tool: what is --$name? (--help)"
            exit 2
        }
        set ::opt($name) $value
    }
}

# Builds what is missing.
proc prepare {} {
    set ::redisBin $::top/build/redis/src
    set ::slotload $::top/build/utils/slotload
    if {[info exists ::env(REDIS_BIN)]} {
        set ::redisBin [file normalize $::env(REDIS_BIN)]
    } else {
        exec $::top/utils/install-deps build >@ stdout 2>@ stderr
        if {[catch {exec make -C $::top -j 2 2>@1} text]} {die "the build failed:\n[string range $text end-2000 end]"}
    }
    if {[info exists ::env(SLOTLOAD)]} {
        set ::slotload [file normalize $::env(SLOTLOAD)]
    } elseif {[catch {exec make -C $::top/utils/slotload 2>@1} text]} {
        die "the load generator does not build:\n[string range $text end-2000 end]"
    }
    uplevel #0 source $::top/build/redis/tests/support/redis.tcl

    set ::work [exec mktemp -d [expr {[info exists ::env(TMPDIR)] ? $::env(TMPDIR) : "/tmp"}]/$::tool.XXXXXX]
}
