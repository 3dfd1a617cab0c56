# Moves of much: one key of gigabytes, a million keys in one slot, all slots of a
# node. Whatever moves, no turn of the event loop may work in proportion to it, at
# neither node: the watch (CLUSTER INFO) must stay below a fixed limit. And all must
# arrive. Takes minutes and 12 GB of memory, so it is not part of the default run:
# tests/run --big, or ./runtest --large-memory --single ...

source tests/support/slot_migration.tcl

# CPU time that one kind of work may take in one turn. The fork's page tables are
# in proportion to the node's memory; the feed is to what clients write themselves.
set ::limit_us 2000
set ::not_limited {fork feed}

# ---- the watch ----

proc longest_work {n} {
    set kinds {}
    foreach part [split [CI $n cluster_slot_migration_longest_work_cpu_us] ,] {
        lassign [split $part =] kind us
        if {$kind ne ""} {lappend kinds [list $kind $us]}
    }
    lsort -integer -decreasing -index 1 $kinds
}

# Kinds of work above the limit, "" if none.
proc too_long {n} {
    set bad {}
    foreach part [longest_work $n] {
        lassign $part kind us
        if {$us > $::limit_us && $kind ni $::not_limited} {lappend bad "$kind $us us"}
    }
    join $bad ", "
}

# As wait_lazyfree_done, which has no patience.
proc wait_freed {n} {
    wait_for_condition 6000 20 {[status [Rn $n] lazyfree_pending_objects] == 0} else {fail "node $n frees for two minutes"}
}

proc fresh_again {} {
    for {set n 0} {$n < [llength $::servers]} {incr n} {
        R $n cluster cancel-slot-migrations all
        R $n flushall
        wait_freed $n
    }
    fresh
}

proc watch_starts {nodes} {
    foreach n $nodes {R $n config resetstat}
}

# A line for each node: the most CPU time of each kind of work in one turn, us.
# Work that goes on after a job's end is over when nothing gets longer any more.
proc watch_ends {name nodes note} {
    set before {}
    while 1 {
        after 300
        set now {}
        foreach n $nodes {
            wait_freed $n
            lappend now [longest_work $n]
        }
        if {$now eq $before} break
        set before $now
    }
    set bad {}
    foreach n $nodes {
        set kinds {}
        foreach part [lrange [longest_work $n] 0 5] {lappend kinds [join $part " "]}
        puts [format "  %-58s node %d  %s%s" $name $n [join $kinds ", "] $note]
        if {[too_long $n] ne ""} {lappend bad "node $n: [too_long $n]"}
    }
    return $bad
}

# Run the body, which must not leave traces that disturb a second run, under the
# watch. Page faults and other processes make CPU time noisy: `again` puts things
# back where they were, and the body has a second try.
proc watched {name nodes body {again {}}} {
    foreach try {1 2} {
        watch_starts $nodes
        set began [clock milliseconds]
        uplevel 1 $body
        set took [format "%.1f" [expr {([clock milliseconds]-$began)/1000.0}]]
        set bad [watch_ends $name $nodes "  ($took s[expr {$try == 2 ? {, second try} : {}}])"]
        if {$bad eq ""} return
        if {$try == 1 && $again ne ""} {
            puts "  NOTE: above $::limit_us us, tried again: $name: $bad"
            uplevel 1 $again
            continue
        }
        fail "$name: longer than $::limit_us us of CPU time in one turn: [join $bad {; }]"
    }
}

proc main_thread_us {n} {
    set sum 0
    foreach what {user sys} {set sum [expr {$sum + [getInfoProperty [R $n info cpu] used_cpu_${what}_main_thread]*1000000}]}
    expr {int($sum)}
}

proc wait_long {n id states {while_waiting {}}} {
    set end [expr {[clock seconds]+900}]
    while {[clock seconds] < $end} {
        set state [job_field $n $id state]
        if {$state in $states} {return $state}
        if {[job_ended $state]} {fail "job $id at node $n is '$state': [job $n $id]"}
        uplevel 1 $while_waiting
        after 10
    }
    fail "job $id at node $n does not get on: [job $n $id]"
}

proc wait_moved {from to id {while_waiting {}}} {
    uplevel 1 [list wait_long $from $id done $while_waiting]
    wait_long $to $id done
    wait_cluster_agrees
}

# ---- live load ----

# Processes that write to these slots, and a check that they lost nothing.
proc start_load {slots} {
    start_writers 2 $slots
}

proc stop_load {handle slots} {
    set seen [stop_writers $handle]
    foreach what {ask tryagain} {assert_equal 0 [dict get $seen $what] $what}
    assert_equal "" [dict get $seen errors]
    assert_morethan [dict get $seen acked] 100
    foreach slot $slots {
        foreach n {0 1} {
            R [slot_owner 0 $slot] del [key_in $slot writer:$n:counter] [key_in $slot writer:$n:list]
        }
    }
}

# ---- big values: made, touched while they move, compared ----

# `number` elements by scripts of `step` each. $1: first, $2: last.
proc fill_by_script {n key number step script} {
    for {set i 0} {$i < $number} {incr i $step} {
        R $n eval $script 1 $key $i [expr {min($i+$step,$number)-1}]
    }
}

proc elements_script {command element {per 500}} {
    return "
        local a = {}
        for i = tonumber(ARGV\[1]),tonumber(ARGV\[2]) do
            $element
            if #a >= $per then redis.call('$command',KEYS\[1],unpack(a)) a = {} end
        end
        if #a > 0 then redis.call('$command',KEYS\[1],unpack(a)) end"
}

# What a big value is about: how it is made, counted, sampled (a digest of some
# thousands of its elements), changed in a way that can be undone.
set ::big {
    hash   {number 20000000 count hlen
            make {hset {a[#a+1]=string.format('field:%08d',i) a[#a+1]=string.format('%032d',i*7)}}
            sample {for i = 0,9999 do r[#r+1] = redis.call('hget',KEYS[1],string.format('field:%08d',i*7919%$number)) or '-' end}
            touch {hset %k live:%i value} back {hdel %k live:%i}}
    list   {number 5000000 count llen
            make {rpush {a[#a+1]='element:'..i}}
            sample {for i = 0,99 do for _,e in ipairs(redis.call('lrange',KEYS[1],i*49999%$number,i*49999%$number+50)) do r[#r+1] = e end end}
            touch {rpush %k live:%i} back {rpop %k}}
    set    {number 5000000 count scard
            make {sadd {a[#a+1]='member:'..i}}
            sample {for i = 0,9999 do r[#r+1] = redis.call('sismember',KEYS[1],'member:'..(i*7919%$number)) end}
            touch {sadd %k live:%i} back {srem %k live:%i}}
    zset   {number 3000000 count zcard
            make {zadd {a[#a+1]=i*1.25 a[#a+1]='member:'..i}}
            sample {for i = 0,9999 do r[#r+1] = redis.call('zscore',KEYS[1],'member:'..(i*7919%$number)) end}
            touch {zadd %k %i live:%i} back {zrem %k live:%i}}
    stream {number 3000000 count xlen
            make {xadd {redis.call('xadd',KEYS[1],(i+1)..'-1','field',i,'other','value'..i)}}
            sample {for i = 0,999 do for _,e in ipairs(redis.call('xrange',KEYS[1],i*2999%$number,'+','count',10)) do r[#r+1] = e[1]..e[2][4] end end}
            touch {xadd %k %t-%i live %i} back {xdel %k %t-%i}}
    string {number 536870912 count strlen
            make {}
            sample {for i = 0,999 do r[#r+1] = redis.call('getrange',KEYS[1],i*536000,i*536000+99) end}
            touch {setrange %k %o LIVEDATA} back {setrange %k %o abcdefgh}}
}

proc make_big {n key type {number 0}} {
    if {$type eq "string"} {
        set part [string repeat abcdefgh 1048576]
        for {set i 0} {$i < 64} {incr i} {R $n append $key $part}
        return
    }
    if {$number == 0} {set number [dict get $::big $type number]}
    fill_by_script $n $key $number 100000 [elements_script {*}[dict get $::big $type make]]
}

proc count_big {n key type} {
    R $n [dict get $::big $type count] $key
}

proc sample_big {n key type} {
    set number [dict get $::big $type number]
    R $n eval "local r = {} [subst -nocommands [string map {[ \\[} [dict get $::big $type sample]]] return redis.sha1hex(table.concat(r,','))" 1 $key
}

# The `i`th change of a value, or its undoing.
proc big_command {key type what i} {
    set words [list %k $key %i $i %t $::touch_time %o [expr {(($i*1000003)%67108864)*8}]]
    lmap word [dict get $::big $type $what] {string map $words $word}
}

proc digest {n key} {
    R $n debug digest-value $key
}

# Changes of a value while it moves, some at a time; ::touched counts what was
# acknowledged. After the hand-off nothing more.
proc touch_some {n key type} {
    if {$::touched == -1} return
    set rd $::touch_client
    for {set i 0} {$i < 20} {incr i} {$rd {*}[big_command $key $type touch [expr {$::touched+$i}]]}
    set moved 0
    for {set i 0} {$i < 20} {incr i} {
        if {[catch {$rd read} error]} {
            if {![string match "MOVED *" $error]} {fail "a write to $key: $error"}
            set moved 1
        } else {
            assert_equal 0 $moved
            incr ::touched
        }
    }
    if {$moved} {set ::touch_over 1}
}

# One move of the slot of `key`, with or without load, with everything checked.
proc move_big {name from to key type slot load others} {
    set number [dict get $::big $type number]
    set sample [sample_big $from $key $type]
    set slots [list $slot {*}$others]
    watched $name [list $from $to] {
        if {$load} {
            set handle [start_load $slots]
            set ::touch_client [redis_deferring_client -$from]
            watch_starts [list $from $to]
        }
        set ::touched 0
        set ::touch_time [expr {9000000000000+[clock milliseconds]}]
        set ::touch_over 0
        set id [migrate $from $to $slot $slot]
        wait_moved $from $to $id {if {$load && !$::touch_over} {touch_some $from $key $type}}
        if {$load} {
            stop_load $handle $slots
            $::touch_client close
            set live $::touched
            assert_morethan $live 0
            if {$type ne "string"} {
                assert_equal [expr {$number+$live}] [count_big $to $key $type]
            } else {
                for {set i 0} {$i < $live} {incr i} {
                    set at [lindex [big_command $key $type touch $i] 2]
                    assert_equal LIVEDATA [R $to getrange $key $at [expr {$at+7}]]
                }
            }
            for {set i 0} {$i < $live} {incr i} {R $to {*}[big_command $key $type back $i]}
        }
        assert_equal $number [count_big $to $key $type]
        assert_equal $sample [sample_big $to $key $type]
        assert_equal 0 [R $from cluster countkeysinslot $slot]
    } {
        set id [migrate $to $from $slot $slot]
        wait_moved $to $from $id
    }
}

tags {large-memory slow} {

start_cluster 3 0 {tags {external:skip cluster} overrides {cluster-node-timeout 120000 save "" repl-timeout 600}} {
    set slot 100
    set others {200 12000}

    foreach type {hash string list set zset stream} {
        test "A $type of [dict get $::big $type number] elements or bytes moves in short turns" {
            fresh_again
            set key [key_in $slot big]
            make_big 0 $key $type
            set before [digest 0 $key]
            move_big "$type, target empty, idle" 0 2 $key $type $slot 0 $others
            move_big "$type, target empty, load" 2 0 $key $type $slot 1 $others
            foreach {n own} {0 300 2 13000} {
                for {set i 0} {$i < 20} {incr i} {R $n debug populate 10000 [key_in [expr {$own+$i}] own] 50}
            }
            move_big "$type, target has keys, idle" 0 2 $key $type $slot 0 $others
            move_big "$type, target has keys, load" 2 0 $key $type $slot 1 $others
            assert_equal $before [digest 0 $key]
            foreach {n keys} {0 200001 2 200000} {assert_equal $keys [R $n dbsize]}
        }
    }

    test "A million small keys in one slot, and one slot with all data of the node" {
        foreach many {small mixed} {
            fresh_again
            if {$many eq "small"} {
                R 0 debug populate 1000000 [key_in $slot key] 30
            } else {
                fill_all_types 0 $slot 1
                R 0 debug populate 200000 [key_in $slot key] 30
                foreach {command elements} {hset 'f',i,'g',2 sadd i,i+1,'x' zadd i,'a',2,'b' rpush i,'b','c' xadd '1-1','f',i} {
                    R 0 eval "
                        for i = 1,50000 do
                            local key = KEYS\[1]..i
                            redis.call('$command',key,$elements)
                            if i % 3 == 0 then redis.call('pexpire',key,100000000+i) end
                            if '$command' == 'hset' and i % 2 == 0 then
                                redis.call('hpexpire',key,200000000+i,'FIELDS',1,'f')
                            end
                        end" 1 [key_in $slot $command:]
                }
                make_big 0 [key_in $slot hash] hash 1000000
            }
            # The sum of all digests, of every key of the node.
            set before [R 0 debug digest]
            set keys [R 0 dbsize]
            set expires [keyspace_field 0 expires]
            set subexpiry [keyspace_field 0 subexpiry]
            foreach {from to load own} {0 2 0 0  2 0 1 0  0 2 0 1  2 0 1 0} {
                if {$own} {
                    foreach {n first} {0 300 2 13000} {
                        for {set i 0} {$i < 20} {incr i} {R $n debug populate 10000 [key_in [expr {$first+$i}] own] 50}
                    }
                }
                watched "$many keys in one slot, target [expr {[R $to dbsize] ? {has keys} : {empty}}], [expr {$load ? {load} : {idle}}]" {0 2} {
                    if {$load} {
                        set handle [start_load [list $slot {*}$others]]
                        watch_starts {0 2}
                    }
                    set id [migrate $from $to $slot $slot]
                    wait_moved $from $to $id
                    if {$load} {stop_load $handle [list $slot {*}$others]}
                    assert_equal $keys [R $to cluster countkeysinslot $slot]
                    assert_equal 0 [R $from cluster countkeysinslot $slot]
                    if {!$load} {
                        assert_equal $expires [keyspace_field $to expires]
                        assert_equal $subexpiry [keyspace_field $to subexpiry]
                        assert_equal 0 [keyspace_field $from subexpiry]
                    }
                    if {!$load && !$own} {assert_equal $before [R $to debug digest]}
                } {
                    wait_moved $to $from [migrate $to $from $slot $slot]
                }
            }
        }
    }

    # What the source does to a value that the target has already, before the hand-off.
    foreach {what number} {del 20000000 set 5000000 rename 5000000 unlink+hset 5000000} {
        test "A hash of $number fields that arrived and then goes by $what is not freed by the target's main thread" {
            fresh_again
            set key [key_in $slot big]
            set expected 1
            watched "$what in mid-import" {0 2} {
                R 0 del $key
                make_big 0 $key hash $number
                failpoint 0 source_before_cut pause
                set id [migrate 0 2 $slot $slot]
                wait_long 0 $id streaming
                wait_for_condition 500 10 {[job_field 2 $id state] eq "following"} else {fail "[job 2 $id]"}
                # The watch of the source is about the migration, not about the DEL.
                switch $what {
                    del {R 0 del $key}
                    set {R 0 set $key small}
                    rename {R 0 set [key_in $slot small] small; R 0 rename [key_in $slot small] $key}
                    unlink+hset {R 0 unlink $key; R 0 hset $key f v}
                }
                wait_for_condition 6000 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "[job 0 $id]"}
                failpoint 0 source_before_cut off
                wait_moved 0 2 $id
                switch $what {
                    del {assert_equal 0 [R 2 dbsize]}
                    unlink+hset {assert_equal {f v} [R 2 hgetall $key]}
                    default {assert_equal small [R 2 get $key]}
                }
            } {
                wait_moved 2 0 [migrate 2 0 $slot $slot]
            }
        }
    }

    foreach type {string list set zset stream} {
        test "A $type of [dict get $::big $type number] elements or bytes that arrived and then is deleted is not freed by the target's main thread" {
            fresh_again
            set key [key_in $slot big]
            watched "del of a $type in mid-import" {0 2} {
                make_big 0 $key $type
                failpoint 0 source_before_cut pause
                set id [migrate 0 2 $slot $slot]
                wait_long 0 $id streaming
                R 0 unlink $key
                wait_for_condition 6000 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "[job 0 $id]"}
                failpoint 0 source_before_cut off
                wait_moved 0 2 $id
                assert_equal 0 [R 2 dbsize]
            } {
                wait_moved 2 0 [migrate 2 0 $slot $slot]
            }
        }
    }

    test "FLUSHALL of the source when the target has 5 million keys" {
        fresh_again
        watched "flushall in mid-import, 5M keys" {0 2} {
            for {set i 0} {$i < 50} {incr i} {R 0 debug populate 100000 [key_in [expr {$slot+$i}] key] 30}
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 $slot [expr {$slot+49}]]
            wait_long 0 $id streaming
            assert_equal 5000000 [job_field 2 $id keys-done]
            R 0 flushall
            R 0 set [key_in $slot after] 1
            wait_for_condition 6000 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "[job 0 $id]"}
            failpoint 0 source_before_cut off
            wait_moved 0 2 $id
            assert_equal 1 [R 2 dbsize]
            assert_equal 0 [R 0 dbsize]
        } {
            R 2 flushall
            wait_moved 2 0 [migrate 2 0 $slot [expr {$slot+49}]]
        }
    }

    test "CANCEL with 2 million queued commands and 2 million keys at the target" {
        fresh_again
        with_config {0 {cluster-slot-migration-buffer-limit 2gb} 2 {cluster-slot-migration-buffer-limit 2gb}} {
            watched "cancel, 2M commands queued, 2M keys" {0 2} {
                for {set i 0} {$i < 20} {incr i} {R 0 debug populate 100000 [key_in [expr {$slot+$i}] key] 30}
                failpoint 2 target_before_section pause
                set id [migrate 0 2 $slot [expr {$slot+19}]]
                wait_long 0 $id snapshot
                set rd [redis_deferring_client 0]
                set script {for i = 1,500 do redis.call('set',KEYS[1]..(ARGV[1]*500+i),i) end}
                for {set i 0} {$i < 4000} {incr i} {
                    $rd eval $script 1 [key_in [expr {$slot+$i%20}] queued:] $i
                    if {$i >= 50} {$rd read}
                }
                for {set i 0} {$i < 50} {incr i} {$rd read}
                $rd close
                wait_for_condition 3000 20 {[status [Rn 2] mem_cluster_slot_migration_queues] > 200000000} else {
                    fail "queues: [status [Rn 2] mem_cluster_slot_migration_queues]"
                }
                R 0 cluster cancel-slot-migrations all
                wait_job_state 0 $id cancelled
                wait_job_state 2 $id cancelled
                failpoint 2 target_before_section off
                assert_equal 4000000 [R 0 dbsize]
                assert_equal 0 [R 2 dbsize]
            } {
                R 0 flushall
                wait_freed 0
            }
            # And in the middle of applying them.
            watched "cancel while 2M queued commands are applied" {0 2} {
                R 0 flushall
                for {set i 0} {$i < 20} {incr i} {R 0 debug populate 100000 [key_in [expr {$slot+$i}] key] 30}
                failpoint 2 target_before_section pause
                set id [migrate 0 2 $slot [expr {$slot+19}]]
                wait_long 0 $id snapshot
                for {set i 0} {$i < 4000} {incr i} {R 0 eval $script 1 [key_in [expr {$slot+$i%20}] queued:] $i}
                failpoint 2 target_before_section off
                wait_for_condition 3000 2 {[job_field 2 $id keys-done] > 0} else {fail "[job 2 $id]"}
                R 0 cluster cancel-slot-migrations all
                wait_job_state 0 $id cancelled
                wait_job_state 2 $id cancelled
                assert_equal 0 [R 2 dbsize]
            } {
                R 0 flushall
                wait_freed 0
            }
        }
    }
}

# ---- all slots ----

proc all_to_first {masters} {
    R 0 cluster addslotsrange 0 16383
}

# Some of everything in every slot; on a node that owns them all.
proc fill_all_slots {n} {
    R $n debug populate 1000000 key 30
    set script {
        for i = tonumber(ARGV[1]),tonumber(ARGV[2]) do
            redis.call('hset','h'..i,'f',i,'g','w')
            redis.call('hpexpire','h'..i,100000000+i,'FIELDS',1,'f')
            if i % 2 == 0 then redis.call('pexpire','h'..i,200000000+i) end
        end}
    for {set i 0} {$i < 200000} {incr i 20000} {R $n eval $script 0 $i [expr {$i+19999}]}
}

# Clients that hear of changes to what they read, or of all.
proc start_tracking {n} {
    set clients {}
    foreach how {{} {bcast} {bcast prefix h} {optin}} {
        set c [connect $n]
        $c hello 3
        $c client tracking on {*}$how
        lappend clients $c
    }
    set c [lindex $clients 0]
    # Of a slot that is not this node's it hears MOVED.
    for {set i 0} {$i < 20000} {incr i} {catch {$c get key:$i}}
    return $clients
}

proc server_modules {} {
    set modules {}
    foreach name {hooks keyspace_events} {
        set file [file normalize tests/modules/$name.so]
        if {![file exists $file] && [catch {exec make -C tests/modules $name.so >& /dev/null}]} {
            puts "  NOTE: tests/modules/$name.so cannot be built: left out"
            continue
        }
        lappend modules $file
    }
    return $modules
}

proc totals {n} {
    list [R $n dbsize] [keyspace_field $n expires] [keyspace_field $n subexpiry]
}

foreach ::with {nothing tracking modules} {
    start_cluster 2 0 {tags {external:skip cluster} overrides {cluster-node-timeout 60000 save "" cluster-allow-replica-migration no}} {
        set few {}
        for {set i 0} {$i < 16384} {incr i 1000} {lappend few $i}
        set odd {}
        for {set i 1} {$i < 16384} {incr i 2} {lappend odd $i $i}
        fill_all_slots 0
        set all [totals 0]
        set before [R 0 debug digest]
        if {$::with eq "modules"} {
            foreach file [server_modules] {foreach n {0 1} {R $n module load $file}}
        }

        foreach {text from to load ranges} {
            "all to a node that has none"      0 1 0 {0 16383}
            "all to a node that has none"      1 0 1 {0 16383}
            "half to a node that has none"     0 1 0 {8192 16383}
            "half to a node that has half"     0 1 1 {0 8191}
            "half to a node that has none"     1 0 0 {0 8191}
            "half to a node that has half"     1 0 1 {8192 16383}
            "every other slot"                 0 1 0 odd
            "every other slot"                 1 0 1 odd
        } {
            test "16384 slots with keys: $text, [expr {$load ? {load} : {idle}}], with $::with" {
                if {$ranges eq "odd"} {set ranges $odd}
                watched "$text, [expr {$load ? {load} : {idle}}], with $::with" {0 1} {
                    set clients [expr {$::with eq "tracking" ? [start_tracking $from] : ""}]
                    if {$load} {set handle [start_load $few]}
                    watch_starts {0 1}
                    set id [migrate $from $to {*}$ranges]
                    wait_moved $from $to $id
                    if {$load} {stop_load $handle $few}
                    foreach c $clients {assert_equal 0 [catch {$c ping}]; $c close}
                    wait_for_condition 3000 10 {[lmap a [totals 0] b [totals 1] {expr {$a+$b}}] eq $all} else {
                        fail "they have [totals 0] and [totals 1] keys, expires, field expires, expected $all in all"
                    }
                } {
                    wait_moved $to $from [migrate $to $from {*}$ranges]
                }
            }
        }

        test "16384 slots with keys: all is as it was, with $::with" {
            assert_equal $all [totals 0]
            assert_equal 0 [R 1 dbsize]
            assert_equal $before [R 0 debug digest]
        }
    } all_to_first
}

# Dicts that are about to grow when they are taken over, all of them.
start_cluster 2 0 {tags {external:skip cluster} overrides {cluster-node-timeout 60000 save "" cluster-allow-replica-migration no}} {
    test "16384 slots whose dicts all grow at the target" {
        watched "all, every dict in the middle of growing" {0 1} {
            foreach n {0 1} {R $n flushall; wait_freed $n}
            # As many keys in each slot as fit, for the loader makes dicts of that size.
            for {set i 0} {$i < 64} {incr i} {
                set rd [redis_deferring_client 0]
                for {set j 0} {$j < 16384} {incr j} {$rd set [key_in $j k$i] v}
                for {set j 0} {$j < 16384} {incr j} {$rd read}
                $rd close
            }
            failpoint 0 source_before_cut pause
            set id [migrate 0 1 0 16383]
            wait_long 0 $id streaming
            set rd [redis_deferring_client 0]
            for {set j 0} {$j < 16384} {incr j} {$rd set [key_in $j more] v}
            for {set j 0} {$j < 16384} {incr j} {$rd read}
            $rd close
            wait_for_condition 6000 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "[job 0 $id]"}
            watch_starts {0 1}
            failpoint 0 source_before_cut off
            wait_moved 0 1 $id
            assert_equal [expr {16384*65}] [R 1 dbsize]
        } {
            wait_moved 1 0 [migrate 1 0 0 16383]
        }
    }
} all_to_first

# Field TTLs are handed over by and by after a take-over: who flushes meanwhile.
start_cluster 2 0 {tags {external:skip cluster} overrides {cluster-node-timeout 60000 save "" cluster-allow-replica-migration no}} {
    test "FLUSHALL ASYNC right after 500000 hashes with field TTLs were taken over" {
        for {set i 0} {$i < 500000} {incr i 20000} {
            R 0 eval "for i = $i,$i+19999 do
                redis.call('hset','h'..i,'f',i)
                redis.call('hpexpire','h'..i,100000000+i,'FIELDS',1,'f') end" 0
        }
        watched "take-over of 500000 hashes with field TTLs, flushall" {0 1} {
            set id [migrate 0 1 0 16383]
            wait_long 1 $id done
            set left [keyspace_field 1 subexpiry]
            set before [main_thread_us 1]
            R 1 flushall async
            set took [expr {[main_thread_us 1]-$before}]
        }
        puts "  NOTE: [expr {500000-$left}] were not handed over yet, the main thread worked $took us for FLUSHALL ASYNC"
        assert_lessthan $took 20000
        wait_moved 0 1 $id
        assert_equal 0 [R 1 dbsize]
    }
} all_to_first

# ---- what clients of other slots see ----

# p99.9 of the operations on other slots in phase "during", of a report of slotload.
proc slotload_p999 {file} {
    set fd [open $file]
    set text [read $fd]
    close $fd
    assert_equal 1 [regexp {during\.other\.all\.p999_us (\d+)} $text -> us] $text
    return $us
}

start_cluster 3 0 {tags {external:skip cluster} overrides {cluster-node-timeout 60000 save ""}} {
    test "Clients of other slots while a hash of 10 million fields moves" {
        set program ../utils/slotload
        if {![file executable $program]} {
            puts "  NOTE: no $program (make -C utils/slotload): left out"
        } else {
            set slot 100
            set key [key_in $slot big]
            make_big 0 $key hash 10000000
            lassign {0 2} from to
            set took 8000
            foreach way {idle during forked} {set p999($way) {}}
            # idle: nothing moves. during: from the order to the end of the trim.
            # forked: the same, without what began while the node forked.
            for {set round 0} {$round < 3} {incr round} {
                foreach way {idle during forked} {
                    set file [tmpfile slotload]
                    set load [open "|$program run 127.0.0.1:[node_port 1] --slots $slot-$slot --rate 4000 --moving-share 0.1 --flat --output $file --status $file.status 2> $file.err" w]
                    fconfigure $load -buffering line
                    wait_for_condition 3000 10 {[file exists $file.status]} else {fail "slotload does not start"}
                    after 500
                    if {$way eq "idle"} {
                        puts $load "phase during"
                        after $took
                    } else {
                        failpoint $from source_before_fork pause
                        puts $load "phase [expr {$way eq {forked} ? {fork} : {during}}]"
                        set began [clock milliseconds]
                        set id [migrate $from $to $slot $slot]
                        wait_long $from $id waiting
                        failpoint $from source_before_fork off
                        wait_long $from $id {snapshot streaming fenced committed trimming done}
                        if {$way eq "forked"} {
                            after 100
                            puts $load "phase during"
                        }
                        wait_moved $from $to $id
                        wait_freed $from
                        set took [expr {[clock milliseconds]-$began}]
                        lassign [list $to $from] from to
                    }
                    puts $load "phase after"
                    puts $load "stop"
                    if {[catch {close $load} error]} {fail "slotload: $error [exec cat $file.err]"}
                    lappend p999($way) [slotload_p999 $file]
                }
            }
            foreach way {idle during forked} {set best($way) [lindex [lsort -integer $p999($way)] 1]}
            puts "  NOTE: p99.9 of other slots in us, 3 rounds: nothing moves $p999(idle), a hash moves $p999(during), without its fork $p999(forked)"
            puts [format "  NOTE: ratio of the medians: %.2f, without the fork %.2f" \
                [expr {double($best(during))/$best(idle)}] [expr {double($best(forked))/$best(idle)}]]
        }
    }
}

}

# In each of the slots so many strings of 100 KB.
proc fill_slots {n first last count} {
    set rd [redis_deferring_client -$n]
    for {set slot $first} {$slot <= $last} {incr slot} {
        $rd eval {for i = 1, ARGV[1] do redis.call('set',KEYS[1]..i,string.rep('x',100*1024)) end} 1 [key_in $slot k] $count
    }
    for {set slot $first} {$slot <= $last} {incr slot} {$rd read}
    $rd close
}

# Bytes that the node has written, to sockets and files.
proc written {n} {
    set fd [open /proc/[node_pid $n]/io]
    regexp {wchar: (\d+)} [read $fd] -> bytes
    close $fd
    return $bytes
}

# What a lost link costs: the section that was on its way, and what stood in the sockets.
start_cluster 3 0 {tags {external:skip cluster large-memory} overrides {cluster-allow-replica-migration no rdbcompression no}} {
    test "Both connections cut at half of 1 GB: hardly more than 1 GB is sent" {
        fresh
        fill_slots 0 0 1999 5
        set before [written 0]
        set id [migrate 0 2 0 1999]
        wait_migrated 0 2 $id
        set whole_sent [expr {[written 0]-$before}]
        set whole [job_field 2 $id bytes-done]
        assert {$whole > 1000000000}
        move_slots 2 0 0 1999
        failpoint 0 source_before_cut pause
        set before [written 0]
        set id [migrate 0 2 0 1999]
        wait_for_condition 3000 1 {[job_field 2 $id bytes-done] > $whole/2} else {fail "[job 2 $id]"}
        failpoint 2 target_cuts_links fail
        wait_for_condition 1000 1 {[job_field 2 $id interruptions] == 1} else {fail "[job 2 $id]"}
        assert_range [job_field 2 $id keys-done] 4000 9999
        failpoint 2 target_cuts_links off
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        assert_equal 10000 [R 2 dbsize]
        set received [job_field 2 $id bytes-done]
        set sent [expr {[written 0]-$before}]
        puts "    with one interruption: received [format %.4f [expr {double($received)/$whole}]] times the snapshot,\
            sent [format %.4f [expr {double($sent)/$whole_sent}]] times what is sent without one"
        assert {$received < 1.01*$whole + 600*1024}
        assert {$sent < 1.01*$whole_sent + 600*1024}
    }
}

# Node 3 is the replica of node 0. All limits are the defaults.
start_cluster 3 1 {tags {external:skip cluster large-memory} overrides {cluster-allow-replica-migration no rdbcompression no}} {
    test "4 GB that arrive neither push the target's replica over its output limit nor out of the backlog" {
        wait_for_condition 1000 20 {[status [Rn 3] master_link_status] eq "up"} else {fail "node 3 is not up"}
        fill_slots 1 6000 9999 10
        foreach stat {sync_full sync_partial_ok sync_partial_err client_output_buffer_limit_disconnections} {
            set before($stat) [status [Rn 0] $stat]
        }
        set most 0
        set id [migrate 1 0 6000 9999]
        while {[job_field 0 $id state] ne "done"} {
            assert {![job_ended [job_field 0 $id state]]}
            if {[regexp {omem=(\d+)} [R 0 client list type replica] - output] && $output > $most} {set most $output}
            after 20
        }
        wait_migrated 1 0 $id
        foreach stat [array names before] {assert_equal $before($stat) [status [Rn 0] $stat] $stat}
        wait_for_condition 3000 20 {[R 3 dbsize] == 40000} else {fail "node 3 has [R 3 dbsize] keys"}
        puts "    the replica's output buffer was $most bytes at most"
        assert {$most < 16*1024*1024}
    }
}
