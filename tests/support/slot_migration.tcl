# slot_migration.tcl -- what the tests of slot migration share.
#
# Nodes are named by number, as R does: 0, 1, ... A test reaches a state by a
# fail point, waits for it with wait_job_state, and compares whole states: every
# key of the slots (slots_dump), the cluster as each node sees it
# (wait_cluster_agrees), what a node holds of the system (wait_no_leftovers).
#
# Run as a program it is what start_writers, start_pipeliners, with_forwarders and
# with_asker put beside the test.

# ---- keys of a given slot ----

# The shortest string of each slot, from the table that redis-cli uses.
proc slot_tag {slot} {
    if {![info exists ::slot_tags]} {
        set fd [open src/crc16_slottable.h]
        set text [read $fd]
        close $fd
        set ::slot_tags {}
        regexp {crc16_slot_table\[\] = \{(.*)\}} $text -> text
        foreach {- tag} [regexp -all -inline {"(\w+)"} $text] {lappend ::slot_tags $tag}
    }
    lindex $::slot_tags $slot
}

proc key_in {slot name} {
    return "{[slot_tag $slot]}$name"
}

# The slots of ranges "first last first last ...".
proc slots_of {ranges} {
    set slots {}
    foreach {first last} $ranges {
        for {set j $first} {$j <= $last} {incr j} {lappend slots $j}
    }
    return $slots
}

# ---- nodes ----

proc node_id {n} {
    R $n cluster myid
}

proc node_port {n} {
    srv -$n port
}

# A connection of its own to node n.
proc connect {n} {
    redis_client -$n
}

# Send a command on a connection of its own, do not read the reply.
proc send_command {n args} {
    set rd [redis_deferring_client -$n]
    $rd client id
    set ::client_of($rd) [$rd read]
    $rd {*}$args
    return $rd
}

# Run one command on an internal connection to node n.
proc internal {n args} {
    set c [connect $n]
    $c debug mark-internal-client
    set failed [catch {$c {*}$args} reply]
    $c close
    if {$failed} {error $reply}
    return $reply
}

# `at` is for points that have a place, such as an offset in the snapshot.
proc failpoint {n name action {at 0}} {
    set c [connect $n]      ;# the node's other one may wait for something
    set failed [catch {$c debug slotmig failpoint $name $action $at} reply]
    $c close
    if {$failed} {error $reply}
}

# How often a fail point was reached since it was set.
proc reached {n name} {R $n debug slotmig failpoint $name}

set ::failpoint_names {
    source_before_attach source_before_fork source_in_child source_in_freeze source_in_filler source_overlooks source_before_cut
    source_before_commit source_after_commit source_before_trim source_before_ask source_before_take_back
    source_damages_section source_cuts_snapshot source_flips_byte source_repeats_command source_drops_command
    target_before_accept target_before_load target_before_section
    target_before_apply target_before_prepared target_prepared target_before_takeover
    target_after_takeover source_replica_told target_replica_prepared target_replica_takeover target_cuts_links link_is_lost
    config_waits_for_disk config_sync_fails
}

proc failpoints_off {n} {
    foreach name $::failpoint_names {failpoint $n $name off}
}

# ---- jobs ----

# Start a job at node `from`; its id.
proc migrate {from to args} {
    set ids [R $from cluster migrate-slots slotsrange {*}$args node [node_id $to]]
    assert_equal 1 [llength $ids]
    lindex $ids 0
}

proc job {n id} {
    lindex [R $n cluster slot-migrations id $id] 0
}

proc job_field {n id field} {
    dict get [job $n $id] $field
}

proc job_ended {state} {
    expr {$state in {done failed cancelled}}
}

# Wait until the job is in one of the states; which. Fails at once if it ends
# in another one.
proc wait_job_state {n id states} {
    set tries 3000
    while {[incr tries -1] >= 0} {
        set job [job $n $id]
        set state [dict get $job state]
        if {$state in $states} {return $state}
        if {[job_ended $state]} break
        after 10
    }
    fail "job $id at node $n is '$state', expected '$states': $job"
}

# Wait until the move is over on both nodes and known by all.
proc wait_migrated {from to id} {
    wait_job_state $from $id done
    wait_job_state $to $id done
    wait_cluster_agrees
}

proc move_slots {from to args} {
    set id [migrate $from $to {*}$args]
    wait_migrated $from $to $id
    return $id
}

# ---- the cluster as the nodes see it ----

# CLUSTER NODES without what differs from node to node by its nature.
proc cluster_view {n} {
    set view {}
    foreach node [get_cluster_nodes $n] {
        set flags [lsearch -all -inline -not -exact [dict get $node flags] myself]
        lappend view [list [dict get $node id] [lindex [split [dict get $node addr] ,] 0] $flags \
            [dict get $node slaveof] [dict get $node config_epoch] [dict get $node slots]]
    }
    lsort $view
}

proc cluster_agrees {} {
    set first [cluster_view 0]
    for {set n 1} {$n < [llength $::servers]} {incr n} {
        if {[cluster_view $n] ne $first} {return 0}
    }
    return 1
}

proc wait_cluster_agrees {} {
    wait_for_condition 1000 10 {[cluster_agrees]} else {
        set views {}
        for {set n 0} {$n < [llength $::servers]} {incr n} {append views "\nnode $n: [cluster_view $n]"}
        fail "the nodes do not agree about the cluster:$views"
    }
    wait_for_cluster_state ok
}

# The number of the node that serves the slot, as node n sees it.
proc slot_owner {n slot} {
    foreach range [R $n cluster slots] {
        if {$slot < [lindex $range 0] || $slot > [lindex $range 1]} continue
        set id [lindex $range 2 2]
        for {set j 0} {$j < [llength $::servers]} {incr j} {
            if {[node_id $j] eq $id} {return $j}
        }
        return $id
    }
    return -1
}

proc wait_slot_owner {n slot owner} {
    wait_for_condition 1000 10 {[slot_owner $n $slot] == $owner} else {
        fail "node $n sees slot $slot at node [slot_owner $n $slot], expected $owner"
    }
}

# ---- keys ----

proc keys_in_slots {n slots} {
    set rd [redis_deferring_client -$n]
    foreach slot $slots {$rd cluster getkeysinslot $slot 1000000}
    set keys {}
    foreach slot $slots {lappend keys {*}[$rd read]}
    $rd close
    lsort $keys
}

# Everything about the keys of the slots at node n: a dict of key to {type
# encoding expiry digest more...}. With "freq" also its LFU counter. Reads go
# to the node's own data (DEBUG, OBJECT), so it is for the slots' owner.
proc slots_dump {n slots {freq ""}} {
    set keys [keys_in_slots $n $slots]
    set rd [redis_deferring_client -$n]
    $rd client no-touch on; $rd read
    set dump {}
    for {set at 0} {$at < [llength $keys]} {incr at 1000} {
        set some [lrange $keys $at [expr {$at+999}]]
        foreach key $some {
            $rd type $key
            $rd object encoding $key
            $rd pexpiretime $key
            $rd debug digest-value $key
            if {$freq ne ""} {$rd object $freq $key}
        }
        foreach key $some {
            set about {}
            for {set i 0} {$i < 4 + ($freq ne "")} {incr i} {lappend about [$rd read]}
            # Which of the two a short string has depends on how it was made.
            if {[lindex $about 1] eq "embstr"} {lset about 1 raw}
            dict set dump $key $about
        }
    }
    foreach key $keys {
        switch [lindex [dict get $dump $key] 0] {
            hash {
                $rd hkeys $key
                set fields [lsort [$rd read]]
                # An expired field is counted, but not shown any more.
                $rd hlen $key
                $rd read
                if {[llength $fields] == 0} continue
                $rd hpexpiretime $key fields [llength $fields] {*}$fields
                dict lappend dump $key $fields [$rd read]
            }
            stream {
                $rd xinfo stream $key full count 0
                set info [$rd read]
                dict unset info radix-tree-keys
                dict unset info radix-tree-nodes
                dict lappend dump $key $info
            }
            vectorset {
                $rd vinfo $key
                set info [$rd read]
                foreach field {hnsw-max-node-uid vset-uid} {dict unset info $field}
                dict lappend dump $key $info
                $rd vrandmember $key 100000
                foreach member [lsort [$rd read]] {
                    $rd vemb $key $member raw
                    $rd vgetattr $key $member
                    dict lappend dump $key $member [$rd read] [$rd read]
                }
            }
        }
    }
    $rd close
    return $dump
}

# 0: equal. The first difference is in the message otherwise.
proc assert_same_dump {expected actual} {
    dict for {key about} $expected {
        if {![dict exists $actual $key]} {fail "key $key is missing ([string range $about 0 200])"}
        if {[dict get $actual $key] ne $about} {
            fail "key $key differs:\nexpected [string range $about 0 1500]\nis       [string range [dict get $actual $key] 0 1500]"
        }
    }
    dict for {key about} $actual {
        if {![dict exists $expected $key]} {fail "key $key is there, expected none ([string range $about 0 200])"}
    }
}

# Keys, expires and bytes as the node counts them.
proc keyspace {n} {
    expr {[regexp {db0:(\S+)} [R $n info keyspace] -> line] ? $line : ""}
}

proc keyspace_field {n field} {
    expr {[regexp "$field=(\\d+)" [keyspace $n] -> value] ? $value : 0}
}

# What every test starts with, whatever the one before it left: no jobs, no fail
# points, no keys, and the slots where they were when the cluster was made.
proc fresh {} {
    set all [llength $::servers]
    for {set n 0} {$n < $all} {incr n} {
        if {[is_alive [node_pid $n]]} {exec kill -CONT [node_pid $n]} else {start_node_again $n}
        failpoints_off $n
        R $n debug set-active-expire 1
        R $n cluster cancel-slot-migrations all
    }
    for {set n 0} {$n < $all} {incr n} {
        wait_for_condition 1000 10 {[jobs_running $n] == 0} else {
            fail "node $n has jobs that do not end: [R $n cluster slot-migrations]"
        }
    }
    flush_all_nodes
    # What a node that was killed while it had two owners' keys is left with.
    for {set n 0} {$n < $all} {incr n} {
        foreach {- slot} [regexp -all -inline {\[(\d+)-[<>]-} [R $n cluster nodes]] {R $n cluster setslot $slot stable}
    }
    wait_cluster_agrees
    set avg [expr {16384.0/$all}]
    for {set n 0} {$n < $all} {incr n} {
        set first [expr {int(ceil($n*$avg))}]
        set last [expr {int(ceil(($n+1)*$avg)-1)}]
        foreach range [R 0 cluster slots] {
            set from [slot_owner 0 [lindex $range 0]]
            if {$from == $n || [lindex $range 1] < $first || [lindex $range 0] > $last} continue
            move_slots $from $n [expr {max($first,[lindex $range 0])}] [expr {min($last,[lindex $range 1])}]
        }
    }
    # The child of a job that has ended may live a moment longer.
    for {set n 0} {$n < $all} {incr n} {
        wait_for_condition 500 10 {[node_children $n] eq ""} else {fail "node $n has a child: [node_children $n]"}
    }
}

proc jobs_running {n} {
    expr {[CI $n cluster_slot_migrations_exporting] + [CI $n cluster_slot_migrations_importing]}
}

proc flush_all_nodes {} {
    for {set n 0} {$n < [llength $::servers]} {incr n} {
        R $n flushall
        wait_lazyfree_done [Rn $n]
    }
}

# ---- what a node holds of the system ----

proc node_pid {n} {
    srv -$n pid
}

proc node_fds {n} {
    llength [glob -nocomplain /proc/[node_pid $n]/fd/*]
}

proc node_children {n} {
    set fd [open /proc/[node_pid $n]/task/[node_pid $n]/children]
    set children [string trim [read $fd]]
    close $fd
    return $children
}

# The established TCP connections of node n as {local-ip local-port remote-ip
# remote-port}, from the kernel's table.
proc node_connections {n} {
    set inodes {}
    foreach fd [glob -nocomplain /proc/[node_pid $n]/fd/*] {
        if {![catch {file readlink $fd} to] && [regexp {^socket:\[(\d+)\]$} $to -> inode]} {dict set inodes $inode 1}
    }
    set connections {}
    foreach table {/proc/net/tcp /proc/net/tcp6} {
        if {[catch {open $table} file]} continue
        foreach line [lrange [split [read $file] \n] 1 end] {
            if {[lindex $line 3] ne "01" || ![dict exists $inodes [lindex $line 9]]} continue
            set connection {}
            foreach at {1 2} {
                lassign [split [lindex $line $at] :] ip port
                lappend connection [kernel_ip $ip] [scan $port %x]
            }
            lappend connections $connection
        }
        close $file
    }
    return $connections
}

proc kernel_ip {hex} {
    if {[string length $hex] == 8} {
        scan $hex %2x%2x%2x%2x d c b a
        return $a.$b.$c.$d
    }
    set words {}
    foreach word [regexp -all -inline {.{8}} $hex] {
        scan $word %2x%2x%2x%2x d c b a
        lappend words [format %x [expr {$a*256+$b}]] [format %x [expr {$c*256+$d}]]
    }
    set ip [join $words :]
    expr {$ip eq "0:0:0:0:0:0:0:1" ? "::1" : $ip}
}

# Those that node n opened to this port.
proc connections_to {n port} {
    lsearch -all -inline -exact -index 3 [node_connections $n] $port
}

# Threads by name, without those that jemalloc starts when it likes.
proc node_threads {n} {
    set names {}
    foreach task [glob -nocomplain /proc/[node_pid $n]/task/*] {
        if {[catch {open $task/comm} fd]} continue
        set name [string trim [read $fd]]
        close $fd
        if {![string match jemalloc* $name]} {lappend names $name}
    }
    lsort $names
}

# To be taken at rest, and compared with by wait_no_leftovers.
proc footprint {n} {
    dict create fds [node_fds $n] children [node_children $n] threads [node_threads $n] \
        memory [status [Rn $n] used_memory]
}

set ::memory_margin 1500000

proc leftovers {n before} {
    set now [footprint $n]
    set wrong {}
    # A job's child may end a moment after the job: there was one, perhaps, but there must be none.
    if {[dict get $now children] ne ""} {lappend wrong "children: [dict get $now children]"}
    # Nor a loader's thread, which may have been there when `before` was taken.
    foreach thread [dict get $now threads] {
        if {$thread eq "slot_loader" || $thread ni [dict get $before threads]} {
            lappend wrong "threads: [dict get $now threads], were [dict get $before threads]"
            break
        }
    }
    if {[dict get $now fds] > [dict get $before fds]} {lappend wrong "descriptors: [dict get $now fds], were [dict get $before fds]"}
    if {[dict get $now memory] > [dict get $before memory] + $::memory_margin} {
        lappend wrong "memory: [dict get $now memory], was [dict get $before memory]"
    }
    return $wrong
}

proc wait_no_leftovers {n before} {
    wait_for_condition 500 20 {[leftovers $n $before] eq ""} else {
        fail "node $n has leftovers: [leftovers $n $before]"
    }
}

# ---- settings ----

# Run the body with these settings, "node {name value ...} ...", and put back what
# was there, whatever happens. On connections that are there already: it opens none.
proc with_config {settings body} {
    set undo {}
    set failed [catch {
        foreach {n some} $settings {
            foreach {name value} $some {
                set undo [linsert $undo 0 [list $n $name [lindex [R $n config get $name] 1]]]
                R $n config set $name $value
            }
        }
        uplevel 1 $body
    } error options]
    # What failed may have left a node that stands still.
    if {$failed} {foreach pid [node_pids] {catch {exec kill -CONT $pid}}}
    foreach setting $undo {
        lassign $setting n name value
        R $n config set $name $value
    }
    if {$failed} {return -options $options $error}
}

# Build one of upstream's test modules, with these edits, and load it.
proc load_test_module {n name edits} {
    set source [open tests/modules/$name.c]
    set text [read $source]
    close $source
    set dir [file normalize [tmpdir $name]]
    set changed [open $dir/$name.c w]
    puts $changed [string map $edits $text]
    close $changed
    exec cc -shared -fPIC -I tests/modules/../../src -o $dir/$name.so $dir/$name.c
    catch {R $n module unload $name}
    R $n module load $dir/$name.so
}

# ---- restarts ----

# Node n died or is to be killed: start it again and connect to it.
proc kill_node {n} {
    catch {exec kill -9 [node_pid $n]}
    wait_for_condition 500 10 {![is_alive [node_pid $n]]} else {fail "node $n does not die"}
}

# Stop a node without the others marking it as failing, however slow the machine.
proc stop_node {n} {
    for {set i 0} {$i < [llength $::servers]} {incr i} {
        if {$i != $n} {R $i config set cluster-node-timeout 600000}
    }
    pause_process [node_pid $n]
}

proc continue_node {n} {
    resume_process [node_pid $n]
    set timeout [lindex [R $n config get cluster-node-timeout] 1]
    for {set i 0} {$i < [llength $::servers]} {incr i} {R $i config set cluster-node-timeout $timeout}
}

proc wait_node_dead {n} {
    wait_for_condition 1000 10 {![is_alive [node_pid $n]]} else {fail "node $n is alive, expected it to be dead"}
}

proc start_node_again {n} {
    restart_server -$n true false
}

# The same as the program `which`, ours or vanilla, that ::runs(n) then names.
proc restart_as {n which} {
    set program [dict get {ours src/redis-server vanilla ../vanilla/src/redis-server} $which]
    if {![file executable $program]} {fail "no server at [file normalize $program]: run make vanilla"}
    set body [info body spawn_server]
    proc spawn_server {config_file stdout stderr args} [string map [list "list src/redis-server" "list $program"] $body]
    set failed [catch {restart_server -$n true false} error options]
    proc spawn_server {config_file stdout stderr args} $body
    if {$failed} {return -options $options $error}
    set ::runs($n) $which
    assert_equal [expr {$which eq "ours"}] [expr {![catch {R $n cluster slot-migrations}]}]
}

# ---- files of keys ----

proc dump_file {n} {
    file join [lindex [R $n config get dir] 1] dump.rdb
}

# A client of this node that hears invalidations for those that redirect to it; and its id.
proc invalidations_of {n} {
    set rd [redis_deferring_client -$n]
    $rd client id
    set id [$rd read]
    $rd subscribe __redis__:invalidate
    $rd read
    list $rd $id
}

# The next that it hears is of this key, or of all.
proc assert_invalidated {rd key} {
    set message [$rd read]
    assert_equal {message __redis__:invalidate} [lrange $message 0 1]
    assert {[lindex $message 2] eq "" || $key in [lindex $message 2]}
}

proc read_file {name} {
    set fd [open $name rb]
    set bytes [read $fd]
    close $fd
    return $bytes
}

proc write_file {name bytes} {
    set fd [open $name wb]
    puts -nonewline $fd $bytes
    close $fd
}

# Run a program that ends by itself: its exit status, or the signal's name, and its output.
proc run {args} {
    set failed [catch {exec {*}$args 2>@1} output options]
    if {!$failed} {return [list 0 $output]}
    set code [dict get $options -errorcode]
    if {[lindex $code 0] ni {CHILDSTATUS CHILDKILLED}} {return [list $code $output]}
    list [lindex $code 2] [regsub {\nchild (process exited abnormally|killed:.*)$} $output ""]
}

proc check_slots {file args} {
    run src/redis-check-rdb --slots $file {*}$args
}

# What a good file says: a dict of slot to {keys expires bytes offset}.
proc slots_in_file {file} {
    lassign [check_slots $file] status output
    if {$status ne 0} {fail "$file: status $status: [string range $output end-300 end]"}
    set slots {}
    foreach {- slot keys expires bytes offset} [regexp -all -inline -line {^ *(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$} $output] {
        dict set slots $slot [list $keys $expires $bytes $offset]
    }
    return $slots
}

# A node of its own that is to end because of this file: its exit status and what it says.
proc start_with {file args} {
    set port [find_available_port $::baseport $::portcount]
    run timeout -s KILL 60 src/redis-server --port $port --cluster-enabled yes \
        --cluster-config-file [file normalize [file dirname $file]/nodes-of-damaged.conf] --dir [file dirname $file] \
        --dbfilename [file tail $file] --save {} --appendonly no --sanitize-dump-payload yes --cluster-slot-load-threads 2 {*}$args
}

proc start_random {} {
    set seed [expr {[info exists ::env(SLOTMIG_SEED)] ? $::env(SLOTMIG_SEED) : 7}]
    expr {srand($seed)}
    return $seed
}

# One to four of the last `size` bytes are others.
proc damage {bytes size} {
    for {set j [expr {int(rand()*4)}]} {$j >= 0} {incr j -1} {
        set at [expr {int([string length $bytes]-1-rand()*min($size,[string length $bytes]))}]
        set bytes [string replace $bytes $at $at [binary format c [expr {int(rand()*256)}]]]
    }
    return $bytes
}

# ---- one key of each kind ----

# A few keys of each kind in two slots and a lone one: some hundred bytes.
proc fill_few {n} {
    set r [Rn $n]
    $r set [key_in 5 s] value
    $r set [key_in 5 i] 12345 px 100000000
    $r rpush [key_in 5 l] a 1 b
    $r zadd [key_in 6 z] 1 a 2.5 b
    $r hset [key_in 6 hx] f v g w
    $r hpexpireat [key_in 6 hx] 4000000000000 fields 1 f
    $r set [key_in 16383 last] yes
}

# Every core type in every encoding, in this slot. `big`: values of megabytes too.
proc fill_all_types {n slot {big 0}} {
    set r [Rn $n]
    foreach {name command} {
        str:int   {set % 12345}
        str:emb   {set % short}
        str:empty {set % ""}
        str:ttl   {set % x px 100000000}
        geo       {geoadd % 13.361389 38.115556 Palermo 15.087269 37.502669 Catania}
        bitmap    {setbit % 100001 1}
        hll       {pfadd % a b c d e f g}
        set:int   {sadd % 1 2 3 70000 5000000000}
        set:lp    {sadd % a b c}
        zset:lp   {zadd % 1 a 2.5 b -inf c +inf d}
        hash:lp   {hset % f1 v1 f2 2 f3 ""}
        list:lp   {rpush % a 1 -3 b}
        list:ttl  {rpush % a}
        hash:ttl  {hset % f v}
    } {
        $r {*}[lreplace $command 1 1 [key_in $slot $name]]
    }
    $r set [key_in $slot str:raw] [string repeat raw 100]
    $r set [key_in $slot str:binary] "\x00\r\n\xff$\x80"
    $r pexpire [key_in $slot list:ttl] 200000000
    $r expire [key_in $slot hash:ttl] 300000

    set k [key_in $slot hash:ht]
    for {set i 0} {$i < 600} {incr i} {lappend fv f$i [string repeat v [expr {$i%80}]]}
    $r hset $k {*}$fv
    $r hset [key_in $slot hash:lpttl] a 1 b 2 c 3
    $r hpexpire [key_in $slot hash:lpttl] 500000000 fields 2 a b
    $r hset [key_in $slot hash:htttl] {*}$fv
    for {set i 0} {$i < 600} {incr i 3} {
        $r hpexpireat [key_in $slot hash:htttl] [expr {4000000000000+$i*1000}] fields 1 f$i
    }

    for {set i 0} {$i < 3000} {incr i} {lappend elements element:$i}
    $r rpush [key_in $slot list:ql] {*}$elements
    $r rpush [key_in $slot list:plain] small [string repeat p 20000] end
    for {set i 0} {$i < 700} {incr i} {lappend ints [expr {$i*7}]; lappend strs m$i; lappend scored [expr {$i/3.0}] m$i}
    $r sadd [key_in $slot set:int2] {*}[lrange $ints 0 300]
    $r sadd [key_in $slot set:ht] {*}$strs
    $r zadd [key_in $slot zset:sl] {*}$scored
    for {set i 0} {$i < 3000} {incr i} {lappend hll h$i}
    $r pfadd [key_in $slot hll:dense] {*}$hll
    $r pfcount [key_in $slot hll:dense]

    set k [key_in $slot stream]
    for {set i 1} {$i <= 250} {incr i} {$r xadd $k $i-1 field $i other value$i}
    $r xgroup create $k g1 0 entriesread 0
    $r xgroup create $k g2 100-1
    $r xgroup create $k empty $
    $r xgroup createconsumer $k g1 idle
    $r xreadgroup group g1 alice count 10 streams $k >
    $r xreadgroup group g1 bob count 5 streams $k >
    $r xreadgroup group g2 carol count 3 streams $k >
    $r xack $k g1 1-1 2-1
    $r xclaim $k g1 bob 0 3-1 retrycount 7
    $r xdel $k 4-1 20-1 250-1
    $r xtrim $k minid 2-0
    $r xadd [key_in $slot stream:empty] 5-5 a b
    $r xdel [key_in $slot stream:empty] 5-5
    $r xsetid [key_in $slot stream:empty] 9-9 entriesadded 100 maxdeletedid 7-7

    foreach {quant option} {q8 q8 f32 noquant bin bin} {
        set k [key_in $slot vset:$quant]
        for {set i 0} {$i < 20} {incr i} {
            $r vadd $k values 3 [expr {$i/20.0}] [expr {1-$i/30.0}] 0.5 e$i $option
        }
        $r vsetattr $k e3 {{"year": 1999}}
        $r vrem $k e5
    }
    if {$big} {
        $r set [key_in $slot big:str] [string repeat 0123456789abcdef 327680]
        $r append [key_in $slot big:str] tail
        $r rpush [key_in $slot big:list] [string repeat z 2000000] [string repeat y 100]
        set many {}
        for {set i 0} {$i < 20000} {incr i} {lappend many field:$i value:$i}
        $r hset [key_in $slot big:hash] {*}$many
        $r sadd [key_in $slot big:set] {*}$many
    }
}

# `count` plain strings over the slots, written through one connection.
proc fill_strings {n slots count {size 20}} {
    set rd [redis_deferring_client -$n]
    set value [string repeat v $size]
    set waiting 0
    for {set i 0} {$i < $count} {incr i} {
        $rd set [key_in [lindex $slots [expr {$i % [llength $slots]}]] k$i] $value:$i
        if {[incr waiting] == 500} {
            while {$waiting} {$rd read; incr waiting -1}
        }
    }
    while {$waiting} {$rd read; incr waiting -1}
    $rd close
}

# ---- writers whose acknowledged writes are counted ----

# Start `count` processes that write to keys of these slots, each to its own
# keys, and follow redirections. A handle for stop_writers. With `mortal`, a node
# that may die or -1, they take their time, and what that node has acknowledged
# counts only when its replica has it, too.
proc start_writers {count slots {mortal ""}} {
    set tags {}
    foreach slot $slots {lappend tags [slot_tag $slot]}
    set ports {}
    for {set n 0} {$n < [llength $::servers]} {incr n} {lappend ports [node_port $n]}
    set slow {}
    if {$mortal ne ""} {set slow [expr {$mortal == -1 ? 0 : [node_port $mortal]}]}
    set handle {}
    for {set i 0} {$i < $count} {incr i} {
        set file [tmpfile writer]
        set pid [exec [info nameofexecutable] tests/support/slot_migration.tcl writer $file [pid] $i $::tls $ports $tags $slow >& $file.log &]
        lappend handle [list $pid $file]
    }
    foreach writer $handle {
        wait_for_condition 500 10 {[file exists [lindex $writer 1].running]} else {fail "the writer did not start"}
    }
    return $handle
}

# How many writes the writers have had acknowledged so far.
proc writers_acked {handle} {
    set sum 0
    foreach writer $handle {incr sum [file size [lindex $writer 1].running]}
    return $sum
}

# Wait until each writer has had more writes acknowledged, by default 50.
proc wait_writers_go_on {handle {more 50}} {
    foreach writer $handle {
        set file [lindex $writer 1].running
        set before [file size $file]
        wait_for_condition 1500 10 {[file size $file] >= $before + $more} else {
            fail "a writer does not get on: [exec cat [lindex $writer 1].log]"
        }
    }
}

# End them, and look at the nodes for what they wrote: each counter must be at
# least what was acknowledged and at most what was attempted, each list must
# have every acknowledged element in its order. What the writers saw, added up:
# acked, moved, ask, tryagain, errors, twice (slots whose client was redirected
# more than once in a row). `owner`: ask this node, not all who owns a slot.
proc stop_writers {handle {owner ""}} {
    set seen {acked 0 moved 0 ask 0 tryagain 0 errors {} twice 0}
    foreach writer $handle {
        lassign $writer pid file
        close [open $file.stop w]
        wait_for_condition 1500 10 {[file exists $file]} else {
            fail "the writer does not end: [exec cat $file.log]"
        }
        set fd [open $file]
        set result [read $fd]
        close $fd
        foreach what {acked moved ask tryagain twice} {dict incr seen $what [dict get $result $what]}
        dict lappend seen errors {*}[dict get $result errors]
        verify_writes [dict get $result keys] $owner
    }
    return $seen
}

proc verify_writes {keys {owner ""}} {
    dict for {key about} $keys {
        set r [Rn [expr {$owner ne "" ? $owner : [slot_owner 0 [R 0 cluster keyslot $key]]}]]
        if {[string match *:counter $key]} {
            lassign $about acked attempted
            set value [$r get $key]
            if {$value eq ""} {set value 0}
            if {$value < $acked || $value > $attempted} {
                fail "lost writes: $key is $value, acknowledged $acked, attempted $attempted"
            }
        } else {
            set at -1
            set elements [$r lrange $key 0 -1]
            foreach acked $about {
                set next [lsearch -exact -start [expr {$at+1}] $elements $acked]
                if {$next == -1} {fail "lost writes: $acked was acknowledged, but $key does not have it in its place"}
                set at $next
            }
        }
    }
}

# Start `count` processes, each with eight connections to each of these nodes,
# that send INCRs of keys of these slots in batches, to all nodes alike: who does
# not own a slot answers MOVED.
proc start_pipeliners {count nodes slots} {
    set tags {}
    foreach slot $slots {lappend tags [slot_tag $slot]}
    set ports {}
    foreach n $nodes {lappend ports [node_port $n]}
    set handle {}
    for {set i 0} {$i < $count} {incr i} {
        set file [tmpfile pipeliner]
        set pid [exec [info nameofexecutable] tests/support/slot_migration.tcl pipeliner $file [pid] $i $::tls $ports $tags >& $file.log &]
        lappend handle [list $pid $file]
    }
    return $handle
}

# End them. Every key must be what was acknowledged, no more and no less. How many
# commands were answered, by what: acked, moved.
proc stop_pipeliners {handle} {
    set seen {acked 0 moved 0}
    foreach pipeliner $handle {
        lassign $pipeliner pid file
        close [open $file.stop w]
        wait_for_condition 1500 10 {[file exists $file]} else {
            fail "the pipeliner does not end: [exec cat $file.log]"
        }
        set fd [open $file]
        set result [read $fd]
        close $fd
        if {[dict get $result errors] ne ""} {fail "errors in a pipeline: [lrange [dict get $result errors] 0 5]"}
        dict for {key acked} [dict get $result keys] {
            assert_equal $acked [[Rn [slot_owner 0 [R 0 cluster keyslot $key]]] get $key] "$key, acknowledged $acked times"
            dict incr seen acked $acked
        }
        dict incr seen moved [dict get $result moved]
    }
    return $seen
}

# Run the body with a process that sends this command to node n without an end, faster than
# it is read: each turn of the node's event loop finds some.
proc with_asker {n command body} {
    set file [tmpfile asker]
    set pid [exec [info nameofexecutable] tests/support/slot_migration.tcl asker $file [pid] [srv -$n host] [srv -$n port] $command >& $file.log &]
    set failed [catch {
        wait_for_condition 500 10 {[file exists $file.running]} else {fail "the asker did not start: [exec cat $file.log]"}
        uplevel 1 $body
    } error options]
    close [open $file.stop w]
    wait_for_condition 1500 10 {![is_alive $pid]} else {exec kill $pid}
    if {$failed} {return -options $options $error}
}

# Run the body with a process that passes on what comes to the addresses
# "listen-ip listen-port to-ip to-port ...", as a NAT does.
proc with_forwarders {ways body} {
    set file [tmpfile forwarder]
    set pid [exec [info nameofexecutable] tests/support/slot_migration.tcl forwarder $file [pid] $ways >& $file.log &]
    set failed [catch {
        wait_for_condition 500 10 {[file exists $file.running]} else {fail "the forwarder did not start: [exec cat $file.log]"}
        uplevel 1 $body
    } error options]
    exec kill $pid
    if {$failed} {return -options $options $error}
}

# ---- shards: masters are nodes 0 to 2, the replica of node n is node n+3 ----

# Who is the master in the shard of node 0, 1 or 2, as the nodes see themselves; -1: nobody.
proc shard_master {shard} {
    foreach n [list $shard [expr {$shard+3}]] {
        if {[is_alive [node_pid $n]] && [status [Rn $n] role] eq "master"} {return $n}
    }
    return -1
}

# The other node of its shard.
proc shard_mate {n} {
    expr {($n+3) % 6}
}

proc wait_promoted {n} {
    wait_for_condition 3000 10 {[status [Rn $n] role] eq "master"} else {fail "node $n is not promoted: [R $n cluster nodes]"}
}

proc wait_replicas_up {} {
    for {set n 0} {$n < [llength $::servers]} {incr n} {
        if {[status [Rn $n] role] eq "master"} continue
        wait_for_condition 2000 10 {[status [Rn $n] master_link_status] eq "up"} else {fail "replica $n is not up"}
    }
}

# Master and replica of the shard have the same keys, by content, by number, and by
# number in each of the slots.
proc wait_shard_agrees {shard slots} {
    wait_for_condition 1500 10 {
        [R $shard dbsize] == [R [shard_mate $shard] dbsize] && [R $shard debug digest] eq [R [shard_mate $shard] debug digest]
    } else {
        fail "node $shard has [R $shard dbsize] keys, node [shard_mate $shard] [R [shard_mate $shard] dbsize]"
    }
    foreach slot $slots {
        assert_equal [R $shard cluster countkeysinslot $slot] [R [shard_mate $shard] cluster countkeysinslot $slot] "slot $slot in shard $shard"
    }
    assert_equal [keyspace_field $shard expires] [keyspace_field [shard_mate $shard] expires]
    wait_for_condition 1000 10 {[keyspace_field $shard subexpiry] == [keyspace_field [shard_mate $shard] subexpiry]} else {
        fail "node $shard: [keyspace $shard], node [shard_mate $shard]: [keyspace [shard_mate $shard]]"
    }
}

# All writes to the master have got to its replica.
proc wait_shard_in_step {shard} {
    wait_for_condition 1500 10 {[status [Rn $shard] master_repl_offset] == [status [Rn [shard_mate $shard]] master_repl_offset]} else {
        fail "the replica in shard $shard lags"
    }
}

# A master that lost its slots to several nodes is a replica of none of them, or of
# one of another shard: as an operator brings it back to its own.
proc back_to_shard {n} {
    set mate [shard_mate $n]
    wait_for_condition 1500 10 {[status [Rn $n] role] eq "slave" || [dict get [cluster_get_myself $n] slots] eq ""} else {
        fail "node $n keeps slots: [R $n cluster nodes]"
    }
    if {[dict get [cluster_get_myself $n] slaveof] eq [node_id $mate]} return
    if {[status [Rn $n] role] eq "master"} {R $n flushall}
    wait_for_condition 500 10 {![catch {R $n cluster replicate [node_id $mate]} error]} else {fail $error}
}

# As `fresh`, for three shards of two nodes. Who is the master stays so with `stay`:
# a node that was elected wins once more by the same votes for a few seconds, and
# those who gave them give none for as long.
proc fresh_shards {slots {stay ""}} {
    for {set n 0} {$n < 6} {incr n} {
        if {[is_alive [node_pid $n]]} {exec kill -CONT [node_pid $n]} else {start_node_again $n}
    }
    for {set n 0} {$n < 6} {incr n} {
        failpoints_off $n
        R $n config set cluster-node-timeout 3000
        R $n config set cluster-replica-validity-factor 0
        if {[status [Rn $n] role] eq "master"} {R $n cluster cancel-slot-migrations all}
    }
    # What only an operator could end, after a test that failed.
    for {set n 0} {$n < 6} {incr n} {
        foreach job [R $n cluster slot-migrations] {
            if {[dict get $job state] in {committed prepared inherited}} {catch {R $n cluster cancel-slot-migrations id [dict get $job id] force}}
        }
    }
    for {set n 0} {$n < 6} {incr n} {
        wait_for_condition 1500 10 {[jobs_running $n] == 0} else {
            fail "node $n has jobs that do not end: [R $n cluster slot-migrations]"
        }
    }
    wait_replicas_up
    for {set n 0} {$n < 3} {incr n} {
        if {$stay ne "" || [shard_master $n] == $n} continue
        # Nobody writes.
        wait_shard_in_step $n
        R $n cluster failover takeover
    }
    wait_cluster_agrees
    wait_replicas_up
    foreach shard {0 1 2} {R [shard_master $shard] flushall}
    foreach shard {1 2} {
        set from [shard_master $shard]
        set here [lmap slot $slots {if {[slot_owner 0 $slot] != $from} continue; set slot}]
        if {$here ne ""} {move_slots $from [shard_master 0] [lindex $here 0] [lindex $here end]}
    }
    foreach n {0 1 2} {wait_shard_agrees $n $slots}
}

# Of the nodes that live; none may be stopped.
proc set_failover_timeouts {ms} {
    for {set n 0} {$n < 6} {incr n} {
        if {[is_alive [node_pid $n]]} {R $n config set cluster-node-timeout $ms}
    }
}

# ---- a node of upstream's ----

# Servers of no cluster: puts the address of each into the variable of that name.
proc with_servers {names body} {
    set pids {}
    foreach name $names {
        upvar $name address
        set port [find_available_port $::baseport $::portcount]
        set dir [file normalize [tmpdir server]]
        set pid [exec src/redis-server --port $port --dir $dir --cluster-enabled yes --cluster-node-timeout 3000 --cluster-ping-interval 100 \
            --cluster-allow-replica-migration no --enable-debug-command yes --save "" --logfile $dir/log &]
        send_data_packet $::test_server_fd server-spawned $pid
        lappend pids $pid
        wait_for_condition 200 20 {![catch {set c [redis 127.0.0.1 $port]; $c ping}]} else {fail "no server at port $port"}
        $c close
        set address 127.0.0.1:$port
    }
    set failed [catch {uplevel 1 $body} error options]
    foreach pid $pids name $names {
        upvar $name address
        catch {set id [at $address cluster myid]}
        catch {exec kill -9 $pid}
        for {set n 0} {$n < [llength $::servers]} {incr n} {catch {R $n cluster forget $id}}
        send_data_packet $::test_server_fd server-killed $pid
    }
    if {$failed} {return -options $options $error}
}

# With a connection to a server that the harness does not know.
proc at {address args} {
    set c [redis 127.0.0.1 [lindex [split $address :] 1]]
    set failed [catch {$c {*}$args} reply]
    $c close
    if {$failed} {error $reply}
    return $reply
}

# How many slots the node at that address has.
proc slots_of_master {address} {
    set count 0
    foreach range [lrange [lsearch -inline -index 2 [split [at $address cluster nodes] "\n"] *myself*] 8 end] {
        lassign [split $range -] first last
        incr count [expr {$last eq "" ? 1 : $last-$first+1}]
    }
    return $count
}

# Run the body with an unpatched node that is a member of the cluster. In the
# body, $vanilla is a client of it.
proc with_vanilla_node {body} {
    upvar vanilla vanilla
    set program ../vanilla/src/redis-server
    if {![file executable $program]} {
        fail "no unpatched server at [file normalize $program]: run make vanilla"
    }
    set port [find_available_port $::baseport $::portcount]
    set dir [file normalize [tmpdir vanilla]]
    set pid [exec $program --port $port --dir $dir --cluster-enabled yes --cluster-node-timeout 3000 \
        --cluster-ping-interval 100 --enable-debug-command yes --save "" --logfile $dir/log &]
    send_data_packet $::test_server_fd server-spawned $pid
    set failed [catch {
        wait_for_condition 200 20 {![catch {set vanilla [redis 127.0.0.1 $port]; $vanilla ping}]} else {
            fail "the unpatched server does not start"
        }
        R 0 cluster meet 127.0.0.1 $port
        set id [$vanilla cluster myid]
        set all [expr {[llength $::servers]+1}]
        wait_for_condition 500 20 {[vanilla_is_known $vanilla $id $all]} else {
            fail "the unpatched server does not join the cluster"
        }
        uplevel 1 $body
    } error options]
    catch {
        for {set n 0} {$n < [llength $::servers]} {incr n} {R $n cluster forget $id}
    }
    catch {$vanilla close}
    catch {exec kill -9 $pid}
    send_data_packet $::test_server_fd server-killed $pid
    if {$failed} {return -options $options $error}
}

# {digest number-of-keys} of a directory of append-only files, or of an RDB, in an unpatched
# server. It loads a copy.
proc loaded_by_vanilla {from} {
    set program ../vanilla/src/redis-server
    if {![file executable $program]} {
        fail "no unpatched server at [file normalize $program]: run make vanilla"
    }
    set dir [file normalize [tmpdir vanilla-loads]]
    set append [expr {[file isdirectory $from] ? "yes" : "no"}]
    file copy $from [file join $dir [expr {$append ? "appendonlydir" : "dump.rdb"}]]
    set port [find_available_port $::baseport $::portcount]
    set pid [exec $program --port $port --dir $dir --cluster-enabled yes --appendonly $append \
        --enable-debug-command yes --save "" --logfile $dir/log &]
    send_data_packet $::test_server_fd server-spawned $pid
    set failed [catch {
        wait_for_condition 500 20 {![catch {set r [redis 127.0.0.1 $port]; $r ping} pong] && $pong eq "PONG"} else {
            fail "the unpatched server does not load it: [exec tail -n 20 $dir/log]"
        }
        set loaded [list [$r debug digest] [$r dbsize]]
        $r close
    } error options]
    catch {exec kill -9 $pid}
    send_data_packet $::test_server_fd server-killed $pid
    if {$failed} {return -options $options $error}
    return $loaded
}

proc aof_dir {n} {
    file join [lindex [R $n config get dir] 1] [lindex [R $n config get appenddirname] 1]
}

# A rewrite may be waiting for another child, too.
proc wait_rewritten {n} {
    wait_for_condition 2000 10 {[status [Rn $n] aof_rewrite_scheduled] == 0 && [status [Rn $n] aof_rewrite_in_progress] == 0} else {
        fail "node $n rewrites its append-only file"
    }
}

proc vanilla_is_known {vanilla id all} {
    for {set n 0} {$n < [llength $::servers]} {incr n} {
        if {![string match "*$id*connected*" [R $n cluster nodes]]} {return 0}
        if {[string match "*handshake*" [R $n cluster nodes]]} {return 0}
    }
    expr {[getInfoProperty [$vanilla cluster info] cluster_known_nodes] == $all &&
          [getInfoProperty [$vanilla cluster info] cluster_state] eq "ok"}
}

# ---- jobs that are held in a phase ----

# A phase by its name, the state at both ends in it (-: that node is stopped), and
# the fail point that holds it. `committed` and `bound` are the two halves of the
# same moment: the commit is on its way, and one of the two nodes hangs.
set ::phases_of_a_job {
    offered    offered   -          ""
    waiting    waiting   connecting source_before_fork
    snapshot   snapshot  loading    target_before_section
    streaming  streaming following  source_before_cut
    preparing  fenced    preparing  target_before_prepared
    prepared   fenced    prepared   source_before_commit
    committed  committed -          source_before_commit
    bound      -         prepared   source_before_commit
    trimming   trimming  done       source_before_trim
}

proc phase_node {phase from to} {
    expr {$phase in {snapshot preparing} ? $to : $from}
}

proc set_node_timeouts {ms} {
    for {set n 0} {$n < [llength $::servers]} {incr n} {R $n config set cluster-node-timeout $ms}
}

# Start a job of these slots and hold it in the phase; its id.
proc hold_in_phase {phase from to args} {
    foreach {name at_source at_target point} $::phases_of_a_job {if {$name eq $phase} break}
    set ::held_timeout [lindex [R $from config get cluster-node-timeout] 1]
    set ::held_request ""
    if {$phase in {offered committed bound}} {set_node_timeouts 600000}
    if {$phase eq "offered"} {
        set target [node_id $to]
        pause_process [node_pid $to]
        set ::held_request [send_command $from cluster migrate-slots slotsrange {*}$args node $target]
        wait_for_condition 1000 10 {[CI $from cluster_slot_migrations_exporting] == 1} else {fail "no job at node $from"}
        set id [dict get [lindex [R $from cluster slot-migrations] 0] id]
        wait_job_state $from $id offered
        return $id
    }
    failpoint [phase_node $phase $from $to] $point pause
    if {$phase eq "bound"} {failpoint $from source_after_commit fail}
    set id [migrate $from $to {*}$args]
    switch $phase {
        waiting {
            wait_for_condition 1000 10 {[job_field $from $id reason] eq "paused before the fork"} else {fail "[job $from $id]"}
            wait_for_condition 1000 10 {[job_field $to $id reason] eq "waiting for the source's snapshot"} else {fail "[job $to $id]"}
        }
        committed - bound {
            wait_job_state $to $id prepared
            # Its PREPARED has arrived: the fail point keeps it.
            wait_job_state $from $id fenced
            pause_process [node_pid $to]
            failpoint $from $point off
            wait_job_state $from $id committed
            if {$phase eq "bound"} {
                pause_process [node_pid $from]
                resume_process [node_pid $to]
                wait_for_condition 1000 10 {[string match "*link to the source is lost*" [job_field $to $id reason]] ||
                                            [string match "*asking the source*" [job_field $to $id reason]]} else {fail "[job $to $id]"}
            }
        }
        default {
            wait_job_state $from $id $at_source
            wait_job_state $to $id $at_target
        }
    }
    return $id
}

# Let it go on. What MIGRATE-SLOTS answered, if nobody has heard it yet.
proc let_go {phase from to} {
    foreach {name at_source at_target point} $::phases_of_a_job {if {$name eq $phase} break}
    if {$at_target eq "-"} {resume_process [node_pid $to]}
    if {$at_source eq "-"} {resume_process [node_pid $from]}
    if {$point ne ""} {failpoint [phase_node $phase $from $to] $point off}
    if {$phase eq "bound"} {failpoint $from source_after_commit off}
    if {$phase in {offered committed bound}} {set_node_timeouts $::held_timeout}
    if {$::held_request eq ""} {return ""}
    catch {$::held_request read} reply
    $::held_request close
    return $reply
}

# The states in which a job of these ends came to its end.
proc wait_job_ended {n id} {
    wait_for_condition 1500 10 {[job_ended [job_field $n $id state]]} else {fail "no end at node $n: [job $n $id]"}
    set job [job $n $id]
    if {[dict get $job state] eq "done"} {
        assert_equal "" [dict get $job last-error]
    } else {
        assert_not_equal "" [dict get $job last-error] "reason of [dict get $job state] at node $n"
    }
    dict get $job state
}

# Each slot has one owner, the same as all nodes see it, with all keys (`dump`) and
# nobody else has one of them; nobody has a job, nobody died. The owner.
proc assert_one_owner {slots dump pids} {
    for {set n 0} {$n < [llength $::servers]} {incr n} {
        wait_for_condition 1500 10 {[jobs_running $n] == 0} else {fail "node $n goes on: [R $n cluster slot-migrations]"}
    }
    wait_cluster_agrees
    set owner [slot_owner 0 [lindex $slots 0]]
    foreach slot $slots {assert_equal $owner [slot_owner 0 $slot] "owner of slot $slot"}
    assert_same_dump $dump [slots_dump $owner $slots]
    for {set n 0} {$n < [llength $::servers]} {incr n} {
        if {[lindex $pids $n] ne ""} {assert {[is_alive [lindex $pids $n]]}}
        if {$n == $owner} continue
        # The trim is in the background.
        wait_for_condition 500 10 {[keys_in_slots $n $slots] eq ""} else {fail "node $n has [keys_in_slots $n $slots]"}
    }
    foreach slot $slots {
        assert_equal 1 [R $owner incr [key_in $slot probe]]
        assert_equal 1 [R $owner del [key_in $slot probe]]
    }
    return $owner
}

proc node_pids {} {
    set pids {}
    for {set n 0} {$n < [llength $::servers]} {incr n} {lappend pids [node_pid $n]}
    return $pids
}

# ---- a cluster that a test has taken apart ----

proc all_know_all {} {
    set all [llength $::servers]
    for {set n 0} {$n < $all} {incr n} {lappend ids [node_id $n]}
    for {set n 0} {$n < $all} {incr n} {
        set nodes [R $n cluster nodes]
        if {[regexp {handshake|fail|disconnected} $nodes] || [llength [split [string trim $nodes] \n]] != $all} {return 0}
        foreach id $ids {if {[string first $id $nodes] < 0} {return 0}}
    }
    return 1
}

# As an operator brings nodes together.
proc meet_again {} {
    set all [llength $::servers]
    set tries 100
    while {![all_know_all]} {
        if {[incr tries -1] == 0} {fail "the nodes do not find each other again: [R 0 cluster nodes]"}
        for {set n 0} {$n < $all} {incr n} {
            for {set m 0} {$m < $all} {incr m} {
                if {$m == $n || [regexp "[node_id $m]\[^\n\]* connected" [R $n cluster nodes]]} continue
                R $n cluster meet [srv -$m host] [srv -$m port]
            }
        }
        wait_for_condition 20 50 {[all_know_all]} else {}
    }
}

# As `fresh`, for four nodes, of which the last is a master without slots, whatever
# the test before it left of the cluster.
proc home {} {
    for {set n 0} {$n < 4} {incr n} {
        if {[is_alive [node_pid $n]]} {exec kill -CONT [node_pid $n]} else {start_node_again $n}
        R $n config set cluster-node-timeout 3000
        R $n config set cluster-allow-replica-migration no
        R $n config set cluster-require-full-coverage yes
        failpoints_off $n
        if {[status [Rn $n] role] eq "slave"} {R $n cluster reset soft}
        R $n cluster cancel-slot-migrations all
    }
    # One that waits for a node that is gone for good does so for ever.
    for {set n 0} {$n < 4} {incr n} {
        foreach job [R $n cluster slot-migrations] {
            if {[dict get $job state] in {committed prepared}} {catch {R $n cluster cancel-slot-migrations id [dict get $job id] force}}
        }
    }
    for {set n 0} {$n < 4} {incr n} {
        wait_for_condition 1500 10 {[jobs_running $n] == 0} else {
            fail "node $n has jobs that do not end: [R $n cluster slot-migrations]"
        }
        foreach {- slot} [regexp -all -inline {\[(\d+)-[<>]-} [R $n cluster nodes]] {R $n cluster setslot $slot stable}
    }
    flush_all_nodes
    set claimed 0
    for {set n 0} {$n < 4} {incr n} {
        foreach range [dict get [cluster_get_myself $n] slots] {
            lassign [split $range -] first last
            incr claimed [expr {$last eq "" ? 1 : $last-$first+1}]
        }
    }
    if {$claimed != 16384 || ![all_know_all]} {form_cluster}
    set homes {0 5460 5461 10922 10923 16383}
    wait_cluster_agrees
    for {set n 0} {$n < 4} {incr n} {
        for {set to 0} {$to < 3} {incr to} {
            if {$to == $n} continue
            set ranges {}
            foreach range [dict get [cluster_get_myself $n] slots] {
                lassign [split $range -] first last
                if {$last eq ""} {set last $first}
                set first [expr {max($first,[lindex $homes [expr {2*$to}]])}]
                set last [expr {min($last,[lindex $homes [expr {2*$to+1}]])}]
                if {$first <= $last} {lappend ranges $first $last}
            }
            if {$ranges ne ""} {move_slots $n $to {*}$ranges}
        }
    }
    for {set n 0} {$n < 4} {incr n} {
        wait_for_condition 500 10 {[node_children $n] eq ""} else {fail "node $n has a child: [node_children $n]"}
    }
}

# The empty nodes, as they were when they were new. (FORGET works on for a minute.)
proc form_cluster {} {
    set_node_timeouts 500       ;# for so long is a node down that was alone
    for {set n 0} {$n < 4} {incr n} {R $n cluster reset soft}
    foreach {n first last} {0 0 5460 1 5461 10922 2 10923 16383} {
        R $n cluster addslotsrange $first $last
        R $n cluster bumpepoch
    }
    meet_again
    wait_for_cluster_state ok
    set_node_timeouts 3000
}

# Does node n claim all slots of a range (1), or none (0)?
proc claims {n first last} {
    set mine {}
    foreach range [dict get [cluster_get_myself $n] slots] {
        lassign [split $range -] from to
        for {set j [expr {max($from,$first)}]} {$j <= min($to eq "" ? $from : $to,$last)} {incr j} {lappend mine $j}
    }
    if {[llength $mine] == 0} {return 0}
    expr {[llength $mine] == $last-$first+1 ? 1 : "$mine only"}
}

# What a command answered, errors as text.
proc answer {n args} {
    catch {R $n {*}$args} reply
    return $reply
}

proc fill_moving {n} {
    fill_strings $n {5 6 7} 60
    [Rn $n] hset [key_in 6 hash] f v g w
    [Rn $n] hpexpire [key_in 6 hash] 100000000 fields 1 f
    [Rn $n] set [key_in 7 ttl] x ex 100000
}

# The phases in which the source, or the target, runs.
proc phases_of {end} {
    set phases {}
    foreach {phase at_source at_target point} $::phases_of_a_job {
        if {[expr {$end eq "source" ? $at_source : $at_target}] ne "-"} {lappend phases $phase}
    }
    return $phases
}

# ---- the writer's program ----

# argv: result file, parent's pid, number, tls, ports, tags, and for a slow one the port
# where a write counts only when a replica has it (0: nowhere). It writes a byte per
# acknowledged write to FILE.running until FILE.stop exists (or its parent is
# gone), then the result, as a dict, to FILE.
proc writer_main {file parent number tls ports tags {slow ""}} {
    source tests/support/redis.tcl
    set ::tlsdir tests/tls
    set running [open $file.running w]
    fconfigure $running -buffering none
    set at [lindex $ports 0]
    set keys {}
    set owner {}
    set seen {acked 0 moved 0 ask 0 tryagain 0 errors {} twice 0}
    for {set i 0} {![file exists $file.stop] && [file exists /proc/$parent]} {incr i} {
        set tag [lindex $tags [expr {$i/2 % [llength $tags]}]]
        set key "{$tag}writer:$number:[expr {$i%2 ? {list} : {counter}}]"
        set port [expr {[dict exists $owner $tag] ? [dict get $owner $tag] : $at}]
        if {$i%2} {
            set command [list rpush $key $i]
        } else {
            if {![dict exists $keys $key]} {dict set keys $key {0 0}}
            dict set keys $key [list [lindex [dict get $keys $key] 0] [expr {[lindex [dict get $keys $key] 1]+1}]]
            set command [list incr $key]
        }
        set redirected 0
        while {![file exists $file.stop] || $redirected} {
            if {[catch {
                if {![info exists conn($port)]} {set conn($port) [redis 127.0.0.1 $port 0 $tls]}
                $conn($port) {*}$command
            } reply]} {
                switch -glob $reply {
                    "MOVED *" {
                        dict incr seen moved
                        if {[incr redirected] > 1} {dict incr seen twice}
                        set port [lindex [split [lindex $reply 2] :] end]
                        dict set owner $tag $port
                        if {$redirected < 50} continue
                        dict lappend seen errors "redirected $redirected times"
                    }
                    "ASK *" {dict incr seen ask}
                    "TRYAGAIN*" {dict incr seen tryagain}
                    default {
                        # A node that died: the write is in doubt, the next may succeed.
                        dict lappend seen errors $reply
                        catch {$conn($port) close}
                        unset -nocomplain conn($port)
                        dict unset owner $tag
                        set at [lindex $ports [expr {int(rand()*[llength $ports])}]]
                        after 20
                    }
                }
                break
            }
            if {$slow ne ""} {
                after 2
                if {$port == $slow && ([catch {$conn($port) wait 1 100} replicas] || $replicas < 1)} break
            }
            dict incr seen acked
            if {$i%2} {
                dict lappend keys $key $i
            } else {
                dict set keys $key [list [expr {[lindex [dict get $keys $key] 0]+1}] [lindex [dict get $keys $key] 1]]
            }
            puts -nonewline $running .
            break
        }
    }
    dict set seen keys $keys
    set fd [open $file.tmp w]
    puts -nonewline $fd $seen
    close $fd
    file rename $file.tmp $file
}

# ---- the pipeliner's program ----

proc pipeliner_main {file parent number tls ports tags} {
    source tests/support/redis.tcl
    set ::tlsdir tests/tls
    set connections {}
    foreach port $ports {
        for {set i 0} {$i < 8} {incr i} {lappend connections [redis 127.0.0.1 $port 1 $tls]}
    }
    set batch {}
    foreach tag $tags {foreach i {0 1 2 3} {lappend batch "{$tag}pipe:$number:$i"}}
    set keys {}
    foreach key $batch {dict set keys $key 0}
    set moved 0
    set errors {}
    while {![file exists $file.stop] && [file exists /proc/$parent] && $errors eq ""} {
        foreach c $connections {foreach key $batch {$c incr $key}}
        foreach c $connections {
            foreach key $batch {
                if {![catch {$c read} reply]} {
                    dict incr keys $key
                } elseif {[string match "MOVED *" $reply]} {
                    incr moved
                } else {
                    lappend errors $reply
                }
            }
        }
    }
    set fd [open $file.tmp w]
    puts -nonewline $fd [dict create keys $keys moved $moved errors $errors]
    close $fd
    file rename $file.tmp $file
}

# ---- the asker's program ----

proc asker_main {file parent host port command} {
    set fd [socket $host $port]
    fconfigure $fd -translation binary
    puts $fd "client reply off\r"
    set batch [string repeat "$command\r\n" 1000]
    while {![file exists $file.stop] && [file exists /proc/$parent]} {
        puts -nonewline $fd $batch
        flush $fd
        if {![file exists $file.running]} {close [open $file.running w]}
    }
}

# ---- the forwarder's program ----

proc forwarder_main {file parent ways} {
    proc accept {ip port from - -} {
        if {[catch {socket $ip $port} to]} {close $from; return}
        foreach fd [list $from $to] {fconfigure $fd -translation binary -blocking 0 -buffering none}
        foreach {a b} [list $from $to $to $from] {fcopy $a $b -command [list passed $from $to]}
    }
    proc passed {from to args} {
        catch {close $from}
        catch {close $to}
    }
    proc watch {parent} {
        if {![file exists /proc/$parent]} exit
        after 1000 [list watch $parent]
    }
    foreach {ip port to_ip to_port} $ways {socket -server [list accept $to_ip $to_port] -myaddr $ip $port}
    watch $parent
    close [open $file.running w]
    vwait forever
}

if {[file tail $::argv0] eq "slot_migration.tcl"} {
    [lindex $argv 0]_main {*}[lrange $argv 1 end]
    exit
}
