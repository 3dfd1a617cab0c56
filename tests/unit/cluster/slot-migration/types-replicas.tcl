# Values of every type and encoding get to the target's replica as they are at the
# target, and are still so, with all that is kept beside them, when it is promoted.
# The makers of values are those of types.tcl. Shards are of nodes 0 and 3, 1 and
# 4, 2 and 5.

source tests/support/slot_migration.tcl

# The procedures of types.tcl, without its tests.
set fd [open tests/unit/cluster/slot-migration/types.tcl]
set text [read $fd]
close $fd
eval [string range $text 0 [string first "\nstart_cluster" $text]]

set ::slots {0 1 2 3}

# What both nodes of a shard can be asked for about the keys; a replica answers
# reads for its master's slots once told READONLY. Metadata that a replica has not
# by right is left out: consumers' times, the levels of a random graph.
proc known_by {n} {
    set keys [keys_in_slots $n $::slots]
    set rd [redis_deferring_client -$n]
    foreach command {readonly {client no-touch on}} {$rd {*}$command; $rd read}
    set known {}
    foreach key $keys {
        $rd type $key
        $rd pexpiretime $key
        $rd debug digest-value $key
        set type [$rd read]
        dict set known $key [list $type [$rd read]]
        set digest [$rd read]
        if {$type ni {stream vectorset}} {dict lappend known $key $digest}
        switch $type {
            hash {
                $rd hkeys $key
                set fields [lsort [$rd read]]
                if {$fields eq ""} continue
                $rd hpexpiretime $key fields [llength $fields] {*}$fields
                dict lappend known $key $fields [$rd read]
            }
            stream {
                $rd xrange $key - +
                $rd xinfo groups $key
                dict lappend known $key [$rd read]
                # Upstream tells no replica of a consumer that is new and gets nothing.
                foreach group [$rd read] {dict lappend known $key [dict remove $group consumers]}
            }
            vectorset {
                $rd vcard $key
                dict lappend known $key [$rd read]
                $rd vrandmember $key 100000
                foreach member [lsort [$rd read]] {
                    $rd vemb $key $member raw
                    $rd vgetattr $key $member
                    dict lappend known $key $member [$rd read] [$rd read]
                }
            }
        }
    }
    $rd close
    return $known
}

# OBJECT FREQ or IDLETIME of all keys; the node's own reads do not count.
proc used {n what} {
    set rd [redis_deferring_client -$n]
    foreach command {readonly {client no-touch on}} {$rd {*}$command; $rd read}
    set used {}
    foreach key [keys_in_slots $n $::slots] {
        $rd object $what $key
        dict set used $key [$rd read]
    }
    $rd close
    return $used
}

proc wait_both_know {known} {
    foreach n {2 5} {
        wait_for_condition 500 20 {[dict size [set is [known_by $n]]] == [dict size $known]} else {fail "node $n has [dict size $is] of [dict size $known] keys"}
        assert_same_dump $known $is
    }
}

# At rest, so no vote is needed.
proc promote {n} {
    wait_shard_in_step [expr {$n % 3}]
    R $n cluster failover takeover
    wait_promoted $n
    wait_cluster_agrees
    wait_replicas_up
}

start_cluster 3 3 {tags {external:skip cluster} overrides {cluster-allow-replica-migration no}} {

    test "Random values of every kind are the same at the target's replica, when it is promoted, too" {
        seeded {
            fresh_shards $::slots
            generate 0 $::slots [kinds * *due]
            generate 0 $::slots [kinds *:big] 1
            # Longer than one word of the relay, and than its window.
            R 0 set [key_in 1 chunks] [string repeat [bytes 1000] 40]
            R 0 set [key_in 2 window] [string repeat [bytes 1000] 6000]
            set known [known_by 0]
            set everything [everything 0 $::slots]
            set syncs [status [Rn 2] sync_full]
            move_slots 0 2 0 3
            wait_both_know $known
            assert_equal $syncs [status [Rn 2] sync_full]
            assert_equal [counts 2 $::slots] [counts 5 $::slots]
            assert_equal [keysizes 2] [keysizes 5]
            promote 5
            assert_same_dump $known [known_by 5]
            assert_same_values $everything [everything 5 $::slots]
            wait_both_know $known
            # It goes back from there, by a migration and in its file.
            R 5 debug reload
            assert_same_dump $known [known_by 5]
            move_slots 5 0 0 3
            assert_same_dump $known [known_by 0]
            foreach n {2 5} {assert_equal 0 [R $n dbsize]}
        }
    }

    test "Values that are written while they move are the same at the target's replica, when it is promoted, too" {
        seeded {
            fresh_shards $::slots
            generate 0 $::slots [kinds * *due] 1
            failpoint 2 target_before_section pause
            failpoint 0 source_before_cut pause
            set id [migrate 0 2 0 3]
            wait_job_state 2 $id loading
            # Some wait for their section, some are applied at once.
            R 0 flushall
            generate 0 {0 1} [kinds * *due] 1
            failpoint 2 target_before_section off
            wait_job_state 2 $id following
            generate 0 {2 3} [kinds *] 1 {none far}
            set known [known_by 0]
            failpoint 0 source_before_cut off
            wait_migrated 0 2 $id
            wait_both_know $known
            promote 5
            assert_same_dump $known [known_by 5]
        }
    }

    test "Fields and keys that expire in mid-job or later expire at the target's replica, and after its promotion" {
        fresh_shards $::slots
        R 0 hset [key_in 1 hash] now a soon b late c never d
        R 0 hpexpire [key_in 1 hash] 100000000 fields 1 late
        R 0 hset [key_in 2 all] now a
        R 0 set [key_in 3 late] x px 100000000
        failpoint 0 source_before_cut pause
        set id [migrate 0 2 0 3]
        wait_job_state 0 $id streaming
        wait_job_state 2 $id following
        R 0 hpexpire [key_in 1 hash] 50 fields 1 now
        R 0 hpexpire [key_in 2 all] 50 fields 1 now
        R 0 set [key_in 3 now] x px 50
        wait_for_condition 500 10 {[R 0 hlen [key_in 1 hash]] == 3 && [R 0 dbsize] == 2} else {fail "nothing expires: [R 0 keys *]"}
        failpoint 0 source_before_cut off
        wait_migrated 0 2 $id
        foreach n {2 5} {
            wait_for_condition 500 10 {[R $n dbsize] == 2 && [keyspace_field $n subexpiry] == 1} else {fail "node $n: [keyspace $n]"}
        }
        set late [R 2 hpexpiretime [key_in 1 hash] fields 1 late]
        promote 5
        assert_equal $late [R 5 hpexpiretime [key_in 1 hash] fields 1 late]
        assert_equal {late never soon} [lsort [R 5 hkeys [key_in 1 hash]]]
        R 5 hpexpire [key_in 1 hash] 50 fields 2 soon late
        R 5 pexpire [key_in 3 late] 50
        foreach n {5 2} {
            wait_for_condition 500 10 {[R $n dbsize] == 1 && [keyspace_field $n subexpiry] == 0} else {fail "node $n: [keyspace $n]"}
        }
        assert_equal {never} [R 5 hkeys [key_in 1 hash]]
    }

    foreach {policy what} {allkeys-lfu freq allkeys-lru idletime} {
        test "OBJECT [string toupper $what] is the same at the target's replica and after its promotion, with $policy" {
            fresh_shards $::slots
            foreach n {0 2 3 5} {R $n config set maxmemory-policy $policy lfu-decay-time 0}
            for {set i 0} {$i < 100} {incr i} {
                set key [key_in [expr {$i%4}] k$i]
                R 0 set $key x
                R 0 restore $key 0 [R 0 dump $key] replace $what [expr {$i*2}]
            }
            set begun [clock seconds]
            set before [used 0 $what]
            move_slots 0 2 0 3
            promote 5
            foreach n {2 5} {
                dict for {key value} [used $n $what] {
                    assert_range $value [dict get $before $key] [expr {[dict get $before $key] + ($what eq "freq" ? 0 : [clock seconds]-$begun+2)}] "$key at node $n"
                }
            }
            foreach n {0 2 3 5} {R $n config set maxmemory-policy noeviction lfu-decay-time 1}
        }
    }
}
