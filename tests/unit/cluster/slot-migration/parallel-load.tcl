# An RDB file of a cluster node is loaded by several threads, section by section, and what
# comes out is what upstream's reader makes of it; where that cannot be sure, upstream's
# reader loads it and the log says why. A section that is wrong ends the load as upstream
# would, and never the process in another way.
#
# With --accurate there are 100000 random damages; SLOTMIG_SEED=n makes others.
#
# SPDX-License-Identifier: AGPL-3.0-only

source tests/support/slot_migration.tcl

# ---- what is there ----

# All that a load can make different.
proc everything_at {n {freq ""}} {
    list [R $n debug digest] [R $n dbsize] [keyspace_field $n expires] [keyspace_field $n subexpiry] \
        [R $n info keysizes] [R $n function list withcode] \
        [slots_dump $n {0 5 9000} $freq]
}

proc load_counters {n} {
    list [status [Rn $n] rdb_last_load_keys_loaded] [status [Rn $n] rdb_last_load_keys_expired]
}

proc assert_everything {expected n {freq ""}} {
    set now [everything_at $n $freq]
    foreach what {digest dbsize expires subexpiry keysizes functions} a $expected b $now {
        if {$what eq ""} {assert_same_dump $a $b} else {assert_equal [list $what $a] [list $what $b]}
    }
}

# Every type, encoding and kind of TTL, sections of bytes and of megabytes.
proc fill_kinds {n} {
    set r [Rn $n]
    $r function load replace "#!lua name=lib\nredis.register_function('f', function() return 1 end)"
    foreach slot {5 9000} {fill_all_types $n $slot}
    fill_all_types $n 7 1
    $r set [key_in 0 px] v px 1000000000
    $r set [key_in 0 exat] v exat 4000000000
    $r hset [key_in 0 all] f v
    $r hexpire [key_in 0 all] 1000000 fields 1 f
    fill_strings $n [slots_of {100 900}] 4000
    # What does not get smaller, so that there is enough for many threads.
    for {set i 0} {$i < 2000} {incr i} {append noise [binary format c [expr {int(rand()*256)}]]}
    set rd [redis_deferring_client -$n]
    for {set slot 1000} {$slot < 3000} {incr slot} {$rd set [key_in $slot noise] $noise}
    for {set slot 1000} {$slot < 3000} {incr slot} {$rd read}
    $rd close
}

# Keys and fields whose time is up, that nobody deletes.
proc fill_due {n count} {
    set r [Rn $n]
    $r debug set-active-expire 0
    for {set i 0} {$i < $count} {incr i} {$r set [key_in [expr {100+$i*7}] due$i] v px 1}
    $r hset [key_in 3000 due] f v g w
    $r hpexpire [key_in 3000 due] 1 fields 1 f
    after 5
}

# ---- who loaded it ----

# How often so many threads did; a pattern may stand for the number.
proc loads_by {n {threads "\[0-9\]*"}} {
    count_log_message -$n "slots of the RDB are loaded by threads: $threads$"
}

proc loads_one_by_one {n why} {
    count_log_message -$n "The slots of the RDB are loaded one after another\\. $why"
}

# The body loads once: by so many threads, or in upstream's way, and the log tells `why`.
proc assert_loaded_by {n who body {why ""}} {
    set before [list [loads_by $n] [loads_by $n $who] [loads_one_by_one $n $why]]
    uplevel 1 $body
    set threads [expr {$who ne "upstream"}]
    lassign $before all by told
    assert_equal [list [expr {$all+$threads}] [expr {$by+$threads}] [expr {$told + ($why ne "")}]] \
        [list [loads_by $n] [loads_by $n $who] [loads_one_by_one $n $why]]
}

proc reload {n} {
    assert_equal OK [R $n debug reload nosave]
}

# Start a node with the file and run the body with its client in `c` while it loads.
proc while_loading {file body} {
    upvar 1 c c pid pid log log
    for {set try 0} {$try < 10} {incr try} {
        set port [find_available_port $::baseport $::portcount]
        set log [tmpfile loading.log]
        set pid [exec src/redis-server --port $port --cluster-enabled yes \
            --cluster-config-file [file normalize [file dirname $file]/nodes-of-loading.conf] --dir [file dirname $file] \
            --dbfilename [file tail $file] --save {} --appendonly no --cluster-slot-load-threads 2 --enable-debug-command yes >& $log &]
        set c ""
        set loading 0
        while {[is_alive $pid] && $loading == 0} {
            if {$c eq "" && [catch {set c [redis 127.0.0.1 $port]}]} {
                set c ""
                after 1
                continue
            }
            set info [$c info persistence]
            if {[getInfoProperty $info loading] == 0} break
            set loading [expr {[getInfoProperty $info loading_loaded_bytes] > 100}]
        }
        if {$loading && ![catch {uplevel 1 $body} error options]} {return}
        catch {exec kill -KILL $pid}
        wait_for_condition 500 10 {![is_alive $pid]} else {fail "the node does not die"}
        # It may have been ready before the body was.
        if {$loading && ![string match "NOT LOADING*" $error]} {return -options $options $error}
    }
    fail "the node is ready too soon"
}

# ---- the same as upstream's reader ----

start_cluster 1 0 {tags {external:skip cluster} overrides {save {} cluster-slot-load-threads 4 lfu-decay-time 0}} {
    set dump [dump_file 0]

    test "Several threads load what one does: types, expiry times, usage, functions, counters" {
        foreach {policy freq} {allkeys-lfu freq allkeys-lru ""} {
            R 0 flushall
            R 0 config set maxmemory-policy $policy
            fill_kinds 0
            R 0 restore [key_in 100 idle] 0 [R 0 dump [key_in 5 str:emb]] {*}[expr {$freq ne "" ? "freq 77" : "idletime 1000"}]
            R 0 save
            fill_due 0 100
            R 0 config set cluster-slot-load-threads 1
            R 0 save
            assert_loaded_by 0 upstream {reload 0}
            set expected [everything_at 0 $freq]
            set counters [load_counters 0]
            assert_equal 100 [lindex $counters 1]
            foreach threads {2 8} {
                R 0 config set cluster-slot-load-threads $threads
                assert_loaded_by 0 $threads {reload 0}
                assert_everything $expected 0 $freq
                assert_equal $counters [load_counters 0]
                if {$freq ne ""} {
                    assert_equal 77 [R 0 object freq [key_in 100 idle]]
                } elseif {$policy eq "allkeys-lru"} {
                    assert_range [R 0 object idletime [key_in 100 idle]] 1000 1100
                }
            }
            # What was loaded can be changed and saved.
            R 0 hset [key_in 5 hash:lpttl] more field
            R 0 hpersist [key_in 9000 hash:htttl] fields 1 f0
            R 0 rename [key_in 9000 hash:htttl] [key_in 9000 renamed]
            R 0 del [key_in 7 big:hash]
            set digest [R 0 debug digest]
            R 0 debug reload
            assert_equal $digest [R 0 debug digest]
        }
        R 0 config set maxmemory-policy noeviction
    }

    test "At a restart as well, also with a count by the processors" {
        R 0 flushall
        fill_kinds 0
        R 0 save
        set expected [everything_at 0]
        foreach threads {1 4 0} {
            R 0 config set cluster-slot-load-threads $threads
            R 0 config rewrite
            set by_threads [loads_by 0]
            start_node_again 0
            wait_for_cluster_state ok
            assert_everything $expected 0
            assert_equal 0 [lindex [load_counters 0] 1]
            set processors [exec nproc]
            assert_equal [expr {$by_threads + ($threads == 4 || ($threads == 0 && $processors > 1))}] [loads_by 0]
        }
        R 0 config set cluster-slot-load-threads 4
        R 0 config rewrite
    }

    test "What expires while it is loaded: keys are dropped by a master, not of an append-only file's base" {
        R 0 flushall
        fill_due 0 50
        R 0 save
        assert_equal 51 [R 0 dbsize]
        assert_loaded_by 0 1 {reload 0}
        assert_equal {1 50} [load_counters 0]
        fill_due 0 50
        R 0 config set appendonly yes
        waitForBgrewriteaof [Rn 0]
        wait_for_condition 500 10 {[status [Rn 0] aof_rewrite_in_progress] == 0 && [status [Rn 0] aof_rewrite_scheduled] == 0} else {fail "the rewrite does not end"}
        R 0 config rewrite
        foreach threads {1 4} {
            R 0 config set cluster-slot-load-threads $threads
            R 0 config rewrite
            set by [loads_by 0]
            start_node_again 0
            wait_for_cluster_state ok
            assert_equal [expr {$by + ($threads > 1)}] [loads_by 0]
            assert_equal {51 0} [load_counters 0]
        }
    }

    test "The base of an append-only file is loaded by threads, what was written since by commands" {
        R 0 flushall
        fill_kinds 0
        R 0 bgrewriteaof
        waitForBgrewriteaof [Rn 0]
        fill_strings 0 [slots_of {100 900}] 500 40
        R 0 del [key_in 5 str:emb]
        R 0 hset [key_in 5 hash:lpttl] more field
        set expected [everything_at 0]
        foreach threads {1 4} {
            R 0 config set cluster-slot-load-threads $threads
            R 0 config rewrite
            set by [loads_by 0]
            start_node_again 0
            wait_for_cluster_state ok
            assert_equal [expr {$by + ($threads > 1)}] [loads_by 0]
            assert_everything $expected 0
        }
        R 0 config set appendonly no
        R 0 config rewrite
    }

    test "All slots, one slot, none" {
        R 0 config set cluster-slot-load-threads 4
        R 0 flushall
        fill_strings 0 [slots_of {0 16383}] 33000
        R 0 save
        set digest [R 0 debug digest]
        assert_loaded_by 0 4 {reload 0}
        assert_equal [list $digest 33000] [list [R 0 debug digest] [R 0 dbsize]]
        for {set slot 0} {$slot < 16384} {incr slot 1365} {
            assert_equal [expr {$slot < 33000-2*16384 ? 3 : 2}] [R 0 cluster countkeysinslot $slot]
        }
        R 0 flushall
        fill_strings 0 5 33000 100
        R 0 save
        set digest [R 0 debug digest]
        # There is nothing for a second one to do.
        assert_loaded_by 0 1 {reload 0}
        assert_equal [list $digest 33000 33000] [list [R 0 debug digest] [R 0 dbsize] [R 0 cluster countkeysinslot 5]]
        R 0 flushall
        R 0 save
        assert_loaded_by 0 upstream {reload 0}
        assert_equal 0 [R 0 dbsize]
    }

    # ---- upstream's way ----

    test "The log says why not" {
        fill_kinds 0
        R 0 save
        set digest [R 0 debug digest]
        assert_loaded_by 0 4 {reload 0}
        R 0 config set key-load-delay 1
        assert_loaded_by 0 upstream {reload 0} "A directive for debugging is set."
        R 0 config set key-load-delay 0
        assert_loaded_by 0 upstream {assert_equal OK [R 0 debug reload nosave noflush merge]} "Its keys may be there already."
        load_test_module 0 keyspace_events {}
        assert_loaded_by 0 upstream {reload 0} "There are modules that may have to hear of each key."
        R 0 module unload testkeyspace
        set bytes [read_file $dump]
        # Without the file's own sum, which would tell after it.
        set unsummed [string replace $bytes end-7 end [string repeat \x00 8]]
        write_file $dump [string map {slot-index-at slot-index-az} $unsummed]
        assert_loaded_by 0 upstream {reload 0} "It has no index of slots."
        write_file $dump [string replace $unsummed end-9 end-9 g]
        assert_loaded_by 0 upstream {reload 0} "The index of slots is wrong: "
        write_file $dump $unsummed
        assert_loaded_by 0 4 {reload 0}
        write_file $dump $bytes
        assert_loaded_by 0 4 {reload 0}
        assert_equal $digest [R 0 debug digest]
    }

    test "A node that is no cluster's loads the file as ever" {
        set dir [tmpdir plain]
        file copy $dump $dir/dump.rdb
        start_server [list overrides [list dir [file normalize $dir] dbfilename dump.rdb save {} appendonly no cluster-slot-load-threads 4]] {
            assert_equal $digest [r debug digest]
            assert_equal 0 [loads_by 0]
            assert_equal 0 [loads_one_by_one 0 ""]
        }
    }

    # ---- what is wrong ----

    test "A section that is wrong is named with its slot and offset; a server does not start with it" {
        set file [tmpfile wrong.rdb]
        R 0 flushall
        fill_kinds 0
        R 0 save
        set bytes [read_file $dump]
        lassign [dict get [slots_in_file $dump] 9000] keys expires length offset
        foreach at [list [expr {$offset+$length-1}] [expr {$offset+$length/2}]] {
            set to [expr {[string index $bytes $at] eq "!" ? "?" : "!"}]
            write_file $file [string replace $bytes $at $at $to]
            lassign [start_with $file] status output
            assert_equal 1 $status
            assert_match "*Slot 9000, whose section begins at offset $offset, cannot be loaded: its CRC is * the index has *" $output
            assert_match "*--- RDB ERROR DETECTED ---*" $output
            assert_no_match "*BUG REPORT*" $output
        }
        # Also one that does not fit a thread's buffer.
        lassign [dict get [slots_in_file $dump] 7] keys expires length offset
        assert {$length > 1000000}
        set at [expr {$offset+$length-100}]
        write_file $file [string replace $bytes $at $at "\x01"]
        lassign [start_with $file] status output
        assert_equal 1 $status
        assert_match "*Slot 7, whose section begins at offset $offset, cannot be loaded: its CRC is *" $output
    }

    # ---- meanwhile ----

    test "Clients are answered while threads load; progress is told" {
        R 0 flushall
        R 0 debug populate [expr {$::accurate ? 3000000 : 1000000}] key 30
        R 0 save
        set file [file normalize $dump]
        set total [file size $file]
        while_loading $file {
            if {![catch {$c dbsize} error]} {error "NOT LOADING"}
            if {![string match {*LOADING*} $error]} {error $error}
            set info [$c info persistence]
            if {[getInfoProperty $info loading] == 0} {error "NOT LOADING"}
            assert_equal $total [getInfoProperty $info loading_total_bytes]
            set before [getInfoProperty $info loading_loaded_bytes]
            assert_range $before 100 $total
            after 10
            set info [$c info persistence]
            if {[getInfoProperty $info loading] == 0} {error "NOT LOADING"}
            assert_range [getInfoProperty $info loading_loaded_bytes] $before $total
        }
        wait_for_condition 3000 10 {[getInfoProperty [$c info persistence] loading] == 0} else {fail "it does not end"}
        assert_equal [R 0 dbsize] [$c dbsize]
        assert_equal [R 0 debug digest] [$c debug digest]
        catch {$c shutdown nosave}
        wait_for_condition 500 10 {![is_alive $pid]} else {fail "the node does not end"}
    }

    foreach {how end} {SHUTDOWN {catch {$c shutdown nosave}} SIGTERM {exec kill -TERM $pid}} {
        test "$how ends a node while threads load" {
            while_loading $file {
                eval $end
                wait_for_condition 1000 10 {![is_alive $pid]} else {fail "the node does not end"}
                set said [read_file $log]
                if {[string match "*DB loaded from disk*" $said]} {error "NOT LOADING"}
                assert_match "*slots of the RDB are loaded by threads: 2*bye bye*" $said
                assert_no_match "*BUG REPORT*" $said
                assert_no_match "*Sanitizer*" $said
            }
        }
    }
}

# ---- damage ----

# A few bytes of every kind of value, in three slots.
proc fill_short {n} {
    set r [Rn $n]
    fill_few $n
    $r sadd [key_in 6 set:lp] a b 3 dddddddddddddddddddddddddd
    $r sadd [key_in 6 set:int] 1 2 70000
    $r sadd [key_in 6 set:ht] [string repeat m 70] x
    $r zadd [key_in 6 zset:lp] 1.5 a inf b
    $r zadd [key_in 6 zset:sl] 2 [string repeat m 70] 3 x
    $r rpush [key_in 6 list] [string repeat ab 40] 1 -70000 x
    $r hset [key_in 5 hash:lpttl] f v g w
    $r hexpire [key_in 5 hash:lpttl] 100000 fields 1 f
    $r hset [key_in 5 hash:ht] f [string repeat v 100] g w
    $r hset [key_in 5 hash:htttl] f [string repeat v 100] g w
    $r hexpire [key_in 5 hash:htttl] 100000 fields 1 f
    $r pfadd [key_in 5 hll] a b c
    $r xadd [key_in 16383 stream] 1-1 f v g w
    $r xadd [key_in 16383 stream] 2-1 f v
    $r xgroup create [key_in 16383 stream] g 0
    $r xreadgroup group g c count 1 streams [key_in 16383 stream] >
    foreach e {a b c} {$r vadd [key_in 16383 vset] values 3 1 [scan $e %c] 2 $e}
}

# With sums a section is known as damaged before its values are parsed. Without, all of
# what is parsed may be damaged.
foreach ::sums {yes no} {
    start_cluster 1 0 [list tags {external:skip cluster} overrides [list save {} rdbchecksum $::sums cluster-slot-load-threads 4]] {
        set dump [dump_file 0]

        if {!$::sums} {
            test "A file with checksums that rdbchecksum says not to verify is loaded in upstream's way" {
                fill_few 0
                R 0 save
                assert_loaded_by 0 1 {reload 0}
                # As if there were a sum.
                set bytes [read_file $dump]
                write_file $dump [string replace $bytes end-7 end 12345678]
                assert_loaded_by 0 upstream {reload 0} "It has checksums that rdbchecksum says not to verify."
            }

            test "A key twice, or in another slot's section, is an error and no crash" {
                R 0 flushall
                R 0 set [key_in 5 first] v
                R 0 set [key_in 5 other] v
                R 0 set [key_in 6 third] v
                R 0 save
                set bytes [read_file $dump]
                set offset [lindex [dict get [slots_in_file $dump] 5] 3]
                for {set far 16383} {[string length [slot_tag $far]] != [string length [slot_tag 5]]} {incr far -1} {}
                foreach {from to why} [list first other "it has a key twice" "{[slot_tag 5]}" "{[slot_tag $far]}" "it has a key of slot $far"] {
                    write_file $dump [string map [list $from $to] $bytes]
                    assert_error "*Error trying to load the RDB dump*" {R 0 debug reload nosave}
                    set said "Slot 5, whose section begins at offset $offset, cannot be loaded: $why"
                    assert_equal 1 [count_log_message -0 $said]
                    lassign [start_with $dump --rdbchecksum no] status output
                    assert_equal 1 $status
                    assert_match "*$said*" $output
                    assert_no_match "*BUG REPORT*" $output
                }
            }
        }

        # Upstream's reader forgot what it looks for doubles with, more than 100 bytes each time.
        test "A hash with a field twice, behind one that is too long for a listpack, is refused and leaves nothing behind (checksum $::sums)" {
            R 0 flushall
            set key [key_in 5 hash]
            R 0 hset $key field1 [string repeat v 100] field2 [string repeat w 100]
            R 0 hexpire $key 100000 fields 1 field1
            set value [string map {field2 field1} [R 0 dump $key]]
            R 0 del $key
            set sanitizes [lindex [R 0 config get sanitize-dump-payload] 1]
            R 0 config set sanitize-dump-payload yes
            R 0 debug set-skip-checksum-validation 1
            assert_error "*Bad data format*" {R 0 restore $key 0 $value}
            set before [status [Rn 0] used_memory]
            for {set i 0} {$i < 3000} {incr i} {catch {R 0 restore $key 0 $value}}
            assert_lessthan [status [Rn 0] used_memory] [expr {$before+100000}]
            R 0 debug set-skip-checksum-validation 0
            R 0 config set sanitize-dump-payload $sanitizes
            assert_equal 3001 [count_log_message -0 "Duplicate hash fields detected"]
            assert_equal 0 [R 0 exists $key]
        }

        test "A file that is cut off at any byte is not loaded (checksum $::sums)" {
            R 0 flushall
            fill_few 0
            R 0 save
            set whole [read_file $dump]
            for {set size [expr {[string length $whole]-1}]} {$size >= 0} {incr size -1} {
                write_file $dump [string range $whole 0 $size-1]
                if {![catch {R 0 debug reload nosave} error]} {fail "it loads the first $size of [string length $whole] bytes"}
                assert_match "*Error trying to load the RDB dump*" $error
            }
            write_file $dump $whole
            reload 0
        }

        # No section's head, which would make it a file with an index that does not fit.
        test "Random damage in sections ends no server (checksum $::sums)" {
            set seed [start_random]
            R 0 flushall
            fill_short 0
            R 0 save
            set digest [R 0 debug digest]
            set whole [read_file $dump]
            set bodies {}
            dict for {- about} [slots_in_file $dump] {
                lassign $about keys expires length offset
                lappend bodies [list [expr {$offset+5}] [expr {$length-5}]]
            }
            set failed 0
            set count [expr {$::sums ? ($::accurate ? 10000 : 500) : ($::accurate ? 90000 : 2500)}]
            for {set i 0} {$i < $count} {incr i} {
                set damaged $whole
                for {set j [expr {int(rand()*4)}]} {$j >= 0} {incr j -1} {
                    lassign [lindex $bodies [expr {int(rand()*[llength $bodies])}]] at length
                    set at [expr {$at+int(rand()*$length)}]
                    set damaged [string replace $damaged $at $at [binary format c [expr {int(rand()*256)}]]]
                }
                write_file $dump $damaged
                if {[catch {R 0 debug reload nosave} error]} {
                    if {![string match "*Error trying to load the RDB dump*" $error]} {fail "number $i with seed $seed: $error"}
                    incr failed
                } elseif {$::sums && $damaged ne $whole} {
                    fail "number $i with seed $seed is loaded"
                } elseif {$i%16 == 0} {
                    R 0 debug digest
                }
            }
            assert {$failed > $count/4}
            write_file $dump $whole
            reload 0
            assert_equal $digest [R 0 debug digest]
        }
    }
}

# ---- replicas ----

start_cluster 1 1 {tags {external:skip cluster} overrides {save {} cluster-slot-load-threads 4 repl-diskless-load disabled
        repl-diskless-sync-delay 0 cluster-replica-no-failover yes cluster-node-timeout 30000 repl-backlog-size 10mb}} {
    wait_replicas_up

    test "What a replica has received into a file is loaded by threads, with what is past due" {
        fill_kinds 0
        fill_due 0 100
        R 1 debug set-active-expire 0
        set by [loads_by 1 4]
        file delete [dump_file 1]
        set full [status [Rn 0] sync_full]
        start_node_again 1
        wait_for_condition 1000 10 {[status [Rn 0] sync_full] > $full && [status [Rn 1] master_link_status] eq "up" &&
            [status [Rn 0] master_repl_offset] == [status [Rn 1] master_repl_offset]} else {fail "no full synchronization"}
        assert_equal [expr {$by+1}] [loads_by 1 4]
        assert_equal [R 0 dbsize] [R 1 dbsize]
        assert_equal 0 [status [Rn 1] rdb_last_load_keys_expired]
        foreach field {keys expires subexpiry} {assert_equal [keyspace_field 0 $field] [keyspace_field 1 $field]}
        assert_equal [list [R 0 debug digest] [R 0 info keysizes]] [list [R 1 debug digest] [R 1 info keysizes]]
    }

    test "Keys that a restarted master drops are dropped by a replica that goes on" {
        R 0 config set repl-backlog-size 10mb
        R 0 flushall
        R 0 debug set-active-expire 0
        R 0 set [key_in 5 stays] v
        for {set i 0} {$i < 200} {incr i} {R 0 set [key_in [expr {$i*11}] due$i] v px 1}
        fill_strings 0 [slots_of {0 2000}] 4000 200
        wait_for_ofs_sync [Rn 0] [Rn 1]
        R 0 config set save "10000 1"
        R 0 config rewrite
        assert_equal 4201 [R 0 dbsize]
        start_node_again 0
        wait_for_cluster_state ok
        assert_equal 200 [status [Rn 0] rdb_last_load_keys_expired]
        wait_for_condition 1000 10 {[status [Rn 1] master_link_status] eq "up" && [status [Rn 0] sync_partial_ok] == 1} else {
            fail "no partial synchronization: [R 0 info stats]"
        }
        wait_for_ofs_sync [Rn 0] [Rn 1]
        assert_equal 0 [status [Rn 0] sync_full]
        assert {[loads_by 0] > 0}
        assert_equal [list 4001 [R 0 debug digest]] [list [R 1 dbsize] [R 1 debug digest]]
    }
}
