# What a migration takes in memory is counted, bounded, kept from eviction, and
# given back whatever ends it; what leaves the source leaves in slices.

source tests/support/slot_migration.tcl

set ::kinds {shadow loader queues output}

proc migration_memory {n kind} {
    status [Rn $n] mem_cluster_slot_migration_$kind
}

proc wait_migration_memory_is_back {n} {
    foreach kind $::kinds {
        wait_for_condition 500 10 {[migration_memory $n $kind] == 0} else {
            fail "node $n: mem_cluster_slot_migration_$kind is [migration_memory $n $kind], expected 0"
        }
    }
}

# Hashes with a field that expires in `ms`, one of them that has another field.
proc fill_field_ttls {n slots count ms} {
    set rd [redis_deferring_client -$n]
    set waiting 0
    for {set i 0} {$i < $count} {incr i} {
        set key [key_in [lindex $slots [expr {$i % [llength $slots]}]] hash$i]
        $rd hset $key f v g w
        $rd hpexpire $key $ms fields 1 f
        if {[incr waiting 2] >= 500} {
            while {$waiting} {$rd read; incr waiting -1}
        }
    }
    while {$waiting} {$rd read; incr waiting -1}
    $rd close
}

# The hashes of a merged shadow are handed over to the database's expiry by and by.
proc wait_field_ttls {n count} {
    wait_for_condition 500 10 {[keyspace_field $n subexpiry] == $count} else {
        fail "node $n counts [keyspace_field $n subexpiry] hashes with field TTLs, expected $count"
    }
}

start_cluster 3 0 {tags {external:skip cluster} overrides {cluster-slot-migration-timeout 0}} {
    set slots {3 4 5 6}

    test "INFO memory counts shadow, loader, queues and output, and all is given back" {
        fresh
        foreach n {0 2} {
            wait_migration_memory_is_back $n
            set base$n [footprint $n]
        }
        fill_strings 0 $slots 20000 500
        # Sections that wait to be taken, and a command that waits for its section.
        failpoint 2 target_before_section pause
        set id [migrate 0 2 3 6]
        wait_for_condition 500 10 {[migration_memory 2 loader] > 20000*500} else {fail "loader: [migration_memory 2 loader]"}
        R 0 set [key_in 3 queued] [string repeat q 300000]
        wait_for_condition 500 10 {[migration_memory 2 queues] > 300000} else {fail "queues: [migration_memory 2 queues]"}
        assert_equal 0 [migration_memory 2 shadow]
        failpoint 0 source_before_cut pause
        failpoint 2 target_before_section off
        wait_job_state 0 $id streaming
        wait_for_condition 500 10 {[migration_memory 2 loader] == 0 && [migration_memory 2 shadow] > 20000*500} else {
            fail "shadow: [migration_memory 2 shadow], loader: [migration_memory 2 loader]"
        }
        # It is about what the keys take when they are the node's.
        set shadow [migration_memory 2 shadow]
        # What the target does not read waits at the source.
        stop_node 2
        for {set i 0} {$i < 20} {incr i} {R 0 set [key_in 4 out$i] [string repeat o 1000000]}
        assert_morethan [migration_memory 0 output] 5000000
        assert_morethan [status [Rn 0] mem_not_counted_for_evict] 5000000
        for {set i 0} {$i < 20} {incr i} {R 0 del [key_in 4 out$i]}
        continue_node 2
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        foreach n {0 2} {wait_migration_memory_is_back $n}
        set before [status [Rn 2] used_memory]
        R 2 flushall
        wait_lazyfree_done [Rn 2]
        set took [expr {$before - [status [Rn 2] used_memory]}]
        assert_range $shadow [expr {$took*0.8}] [expr {$took*1.25}]
        foreach n {0 2} {wait_no_leftovers $n [set base$n]}
    }

    test "What commands delete in the shadow is not counted for ever" {
        fresh
        R 0 set [key_in 3 k] x
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 3 6]
        wait_job_state 0 $id streaming
        set before [migration_memory 2 shadow]
        for {set i 0} {$i < 2000} {incr i} {lappend members member:$i}
        for {set i 0} {$i < 100} {incr i} {
            R 0 del [key_in 3 set]
            R 0 sadd [key_in 3 set] {*}$members
        }
        set one [R 0 memory usage [key_in 3 set] samples 0]
        wait_for_condition 500 10 {[job_field 0 $id stream-lag-bytes] == 0} else {fail "the target lags"}
        assert_range [migration_memory 2 shadow] 0 [expr {$before+20*$one}]
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
    }

    foreach {n point} {
        0 source_before_fork 0 source_in_child 0 source_damages_section 2 target_before_load
        2 target_before_section 2 target_before_apply 2 target_before_prepared 2 target_before_takeover
    } {
        test "A job that fails at $point gives all memory back" {
            fresh
            foreach node {0 2} {set base$node [footprint $node]}
            fill_strings 0 $slots 5000 1000
            set before [slots_dump 0 $slots]
            failpoint $n $point fail
            if {$point eq "target_before_apply"} {failpoint 0 source_before_cut pause}
            set id [migrate 0 2 3 6]
            if {$point eq "target_before_apply"} {
                wait_job_state 0 $id streaming
                R 0 set [key_in 3 one] 1
                dict set before [key_in 3 one] [dict get [slots_dump 0 3] [key_in 3 one]]
            }
            wait_job_state 0 $id failed
            foreach node {0 2} {wait_migration_memory_is_back $node}
            assert_same_dump $before [slots_dump 0 $slots]
            R 0 flushall
            wait_lazyfree_done [Rn 0]
            foreach node {0 2} {wait_no_leftovers $node [set base$node]}
        }
    }

    test "A target whose memory runs out in the middle stops the job, with the figures, and evicts nothing" {
        fresh
        R 2 config set maxmemory-policy allkeys-lru
        fill_strings 2 {16000 16001} 2000 1000
        set before [slots_dump 2 {16000 16001}]
        R 0 set [key_in 5 k] small
        failpoint 0 source_before_cut pause
        R 2 config set maxmemory [expr {[status [Rn 2] used_memory]+20000000}]
        R 2 config resetstat
        set id [migrate 0 2 3 6]
        wait_job_state 0 $id streaming
        for {set i 0} {$i < 15} {incr i} {R 0 set [key_in 5 big$i] [string repeat x 1000000]}
        wait_for_condition 500 10 {[migration_memory 2 shadow] > 14000000} else {fail "the writes do not arrive"}
        # The node's own commands look for something to evict.
        R 2 set [key_in 16001 own] x
        assert_equal 0 [status [Rn 2] evicted_keys]
        for {set i 15} {$i < 40} {incr i} {R 0 set [key_in 5 big$i] [string repeat x 1000000]}
        wait_job_state 2 $id failed
        assert_match "*it uses * bytes with the slots that arrive, more than maxmemory *: raise maxmemory*" [job_field 2 $id last-error]
        wait_job_state 0 $id failed
        assert_match "*at the target: it uses *" [job_field 0 $id last-error]
        wait_migration_memory_is_back 2
        R 2 del [key_in 16001 own]
        assert_equal 0 [status [Rn 2] evicted_keys]
        assert_same_dump $before [slots_dump 2 {16000 16001}]
        assert_equal 41 [llength [keys_in_slots 0 5]]
        R 2 config set maxmemory 0
        failpoint 0 source_before_cut off
        move_slots 0 2 3 6
        assert_equal 41 [llength [keys_in_slots 2 5]]
        R 2 config set maxmemory-policy noeviction
    }

    test "What running jobs will still take is kept free for them" {
        fresh
        for {set i 0} {$i < 20} {incr i} {
            R 0 set [key_in 3 big$i] [string repeat x 1000000]
            R 1 set [key_in 6000 big$i] [string repeat x 1000000]
        }
        failpoint 2 target_before_load fail
        R 2 config set maxmemory [expr {[status [Rn 2] used_memory]+30000000}]
        failpoint 0 source_before_fork pause
        set id [migrate 0 2 3 6]
        assert_error "*it uses * of maxmemory * the slots need about 4* more: raise maxmemory*" {migrate 1 2 6000 6000}
        R 0 cluster cancel-slot-migrations all
        R 2 config set maxmemory 0
    }

    test "Field TTLs due at any moment of the trim expire at the target and nowhere else" {
        for {set round 0} {$round < 5} {incr round} {
            fresh
            # Due while they move, while they are trimmed, and after.
            fill_field_ttls 0 $slots 4000 [expr {400 + $round*100}]
            set id [migrate 0 2 3 6]
            wait_migrated 0 2 $id
            assert_equal "" [keyspace 0]
            wait_for_condition 500 10 {[keyspace_field 2 subexpiry] == 0} else {fail "not all has expired: [keyspace 2]"}
            assert_equal 4000 [R 2 dbsize]
        }
        assert_equal PONG [R 0 ping]
    }

    test "Slots leave the source at once, whatever is registered for them; FLUSHALL then is no trouble" {
        fresh
        set base [footprint 0]
        fill_field_ttls 0 $slots 20000 100000000
        fill_field_ttls 0 {100} 200 100000000
        failpoint 0 source_before_trim pause
        set id [migrate 0 2 3 6]
        wait_job_state 0 $id trimming
        wait_job_state 2 $id done
        failpoint 0 source_before_trim off
        R 0 flushall
        wait_job_state 0 $id done
        assert_equal 0 [R 0 dbsize]
        assert_equal 20000 [R 2 dbsize]
        wait_field_ttls 2 20000
        wait_lazyfree_done [Rn 0]
        wait_no_leftovers 0 $base
        fresh
        # And in the middle of taking hashes out of the expiry of the database.
        for {set round 0} {$round < 10} {incr round} {
            fill_field_ttls 0 $slots 5000 100000000
            set id [migrate 0 2 3 6]
            wait_job_state 2 $id done
            R 0 flushall
            wait_job_state 0 $id done
            wait_cluster_agrees
            wait_field_ttls 2 5000
            set id [migrate 2 0 3 6]
            wait_migrated 2 0 $id
            wait_field_ttls 0 5000
            R 0 flushall
        }
        wait_lazyfree_done [Rn 0]
        wait_no_leftovers 0 $base
    }

    if {[string match jemalloc* [status [Rn 0] mem_allocator]]} {
        test "Memory that the keys left goes back to the system at once" {
            fresh
            # It would do so by and by, with a thread of its own also where nothing happens.
            with_config {0 {jemalloc-bg-thread no}} {
                fill_strings 0 $slots 60000 1000
                move_slots 0 2 3 6
                # Both are of the same moment, up to 100 ms ago.
                wait_for_condition 400 10 {[status [Rn 0] allocator_active] < 30000000 && [status [Rn 0] allocator_resident] < 50000000} else {
                    fail "[status [Rn 0] allocator_active] bytes are in use, [status [Rn 0] allocator_resident] are kept"
                }
            }
        }
    }

    test "The watch tells the longest turn of the event loop, and what it was for" {
        fresh
        # What is left to do of the test before may come in between.
        foreach n {0 2} {
            wait_for_condition 100 10 {[R $n config resetstat] eq "OK" && [CI $n cluster_slot_migration_longest_turn_us] == 0} else {
                fail "a turn of [CI $n cluster_slot_migration_longest_turn_us] us for [CI $n cluster_slot_migration_longest_turn_work]"
            }
        }
        assert_equal none [CI 0 cluster_slot_migration_longest_turn_work]
        fill_strings 0 $slots 10000
        move_slots 0 2 3 6
        assert_morethan [CI 0 cluster_slot_migration_longest_turn_us] 0
        assert_morethan [CI 0 cluster_slot_migration_longest_turn_cpu_us] 0
        assert_match *commit=*trim=*freeze=* [CI 0 cluster_slot_migration_longest_work_cpu_us]
        assert_match *attach=*takeover=* [CI 2 cluster_slot_migration_longest_work_cpu_us]
        wait_for_condition 100 10 {[R 0 config resetstat] eq "OK" && [CI 0 cluster_slot_migration_longest_turn_us] == 0} else {
            fail "a turn of [CI 0 cluster_slot_migration_longest_turn_us] us"
        }
    }

    # An allocation is counted by the size asked for, and its end by its place. (Lua's own memory is 24 KB more or less.)
    test "What allocations of any size take is counted as they come and as they go" {
        fresh
        set script {
            local size = 1
            while size < 5200 do
                local value = string.rep('x', size)
                for i = 1, 1000 do redis.call('SET', KEYS[1], value) redis.call('DEL', KEYS[1]) end
                size = size + (size < 200 and 4 or 32)
            end
        }
        R 0 eval $script 1 [key_in 5 a]
        set before [status [Rn 0] used_memory]
        R 0 eval $script 1 [key_in 5 a]
        assert_lessthan [expr {abs([status [Rn 0] used_memory] - $before)}] 40000
    }
}
