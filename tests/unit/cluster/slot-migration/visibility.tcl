# Keys that are on their way are seen by nobody at the target.

source tests/support/slot_migration.tcl

set ::slots {5 6 7}

proc fill {} {
    foreach slot $::slots {fill_all_types 0 $slot}
    fill_strings 0 $::slots 1000
    foreach slot {14000 14001} {fill_all_types 2 $slot}
}

# A job that has all its keys in the target's shadow, and follows the writes.
proc half_imported {} {
    failpoint 0 source_before_cut pause
    set id [migrate 0 2 5 7]
    wait_job_state 0 $id streaming
    wait_job_state 2 $id following
    return $id
}

proc finish {id} {
    failpoint 0 source_before_cut off
    wait_migrated 0 2 $id
}

# What the target shows of its keys, other than the keys themselves.
proc seen_at {n} {
    set keys {}
    set cursor 0
    while 1 {
        lassign [R $n scan $cursor count 1000] cursor some
        lappend keys {*}$some
        if {$cursor == 0} break
    }
    dict create dbsize [R $n dbsize] scan [lsort $keys] keys [lsort [R $n keys *]] \
        keyspace [regsub {,avg_ttl=\d+} [keyspace $n] ""] digest [R $n debug digest] \
        keysizes [R $n info keysizes] count5 [R $n cluster countkeysinslot 5] \
        list5 [R $n cluster getkeysinslot 5 1000] evicted [status [Rn $n] evicted_keys] \
        expired [status [Rn $n] expired_keys] fields [status [Rn $n] expired_subkeys] \
        dirty [status [Rn $n] rdb_changes_since_last_save]
}

start_cluster 3 0 {tags {external:skip cluster}} {
    foreach {state point node} {
        "while its sections are on their way" target_before_section 2
        "when all keys are there" source_before_cut 0
        "when it is prepared" source_before_commit 0
    } {
        test "The target shows its own keys and no others, $state" {
            fresh
            fill
            set before [seen_at 2]
            R 0 config set cluster-slot-migration-write-pause-timeout 60000
            failpoint $node $point pause
            set id [migrate 0 2 5 7]
            switch $point {
                target_before_section {wait_job_state 2 $id loading}
                source_before_cut {wait_job_state 2 $id following}
                source_before_commit {wait_job_state 2 $id prepared}
            }
            assert_equal $before [seen_at 2]
            for {set i 0} {$i < 100} {incr i} {
                assert_not_equal -1 [lsearch -exact [dict get $before keys] [R 2 randomkey]]
            }
            if {$point ne "source_before_commit"} {assert_error "MOVED 5 *" {R 2 get [key_in 5 str:int]}}
            R 0 config set cluster-slot-migration-write-pause-timeout 200
            failpoint $node $point off
            R 0 cluster cancel-slot-migrations all
            fresh
            R 0 config set cluster-slot-migration-write-pause-timeout 10000
        }
    }

    test "CLIENT LIST shows a job's connections as what they are, and only while there is a job" {
        fresh
        fill
        set fields [regexp -all -inline {[a-z-]+(?==)} [R 0 client info]]
        failpoint 2 target_before_section pause
        set id [migrate 0 2 5 7]
        wait_job_state 2 $id loading
        set ports {}
        foreach {n flag} {0 g 2 o} {
            set lines [lsearch -all -inline [split [R $n client list] "\n"] "*name=slot-migration:$id:*"]
            assert_equal 2 [llength $lines] "node $n: [R $n client list]"
            foreach line $lines name {stream snapshot} {
                assert_equal $fields [regexp -all -inline {[a-z-]+(?==)} $line]
                assert_match "* name=slot-migration:$id:$name *flags=$flag *" $line
                regexp {id=([0-9]+) addr=(\S+) laddr=(\S+) fd=} $line -> client addr laddr
                lappend clients($n) $client
                lappend ports [expr {$n == 0 ? [list $addr $laddr] : [list $laddr $addr]}]
            }
            assert_equal 2 [llength [lsort -unique $clients($n)]]
            assert_equal 0 [regexp slot-migration: [R $n client list type normal]]
        }
        assert_equal [lrange $ports 0 1] [lrange $ports 2 3]
        failpoint 2 target_before_section off
        wait_migrated 0 2 $id
        foreach n {0 2} {assert_equal 0 [regexp slot-migration: [R $n client list]]}
        fresh
    }

    test "An import is not in MONITOR, notifications, statistics or the slow log of the target" {
        fresh
        fill
        R 2 config set notify-keyspace-events KEA
        R 2 config set slowlog-log-slower-than 0
        set monitor [redis_deferring_client -2]
        $monitor monitor
        $monitor read
        set events [redis_deferring_client -2]
        $events psubscribe *
        $events read
        R 2 config resetstat
        R 2 slowlog reset
        set id [half_imported]
        set changes [status [Rn 2] rdb_changes_since_last_save]
        R 0 set [key_in 5 str:int] 1
        R 0 lpush [key_in 6 list:ql] live
        R 0 expire [key_in 6 list:ql] 10000
        R 0 del [key_in 7 str:emb]
        R 0 hpexpire [key_in 7 hash:ht] 100000 fields 1 f1
        wait_for_condition 500 10 {[job_field 0 $id stream-lag-bytes] == 0 && [job_field 0 $id stream-bytes] > 0} else {fail "the target lags"}
        # They count when the slots are the target's.
        assert_equal $changes [status [Rn 2] rdb_changes_since_last_save]
        finish $id
        assert_morethan [status [Rn 2] rdb_changes_since_last_save] $changes
        foreach command {set lpush del expire pexpireat hpexpire hpexpireat restore} {
            assert_equal "" [cmdrstat $command [Rn 2]] "statistics of $command"
        }
        foreach entry [R 2 slowlog get -1] {
            assert {[string tolower [lindex $entry 3 0]] ni {set lpush del expire pexpireat hpexpire hpexpireat restore}}
        }
        assert_equal 0 [status [Rn 2] keyspace_misses]
        # A mark, and nothing of the slots before it.
        R 2 set [key_in 14000 mark] x
        assert_match "*__key*@0__:* *" [set message [$events read]]
        assert_match "*[key_in 14000 mark]*" $message
        while 1 {
            set line [$monitor read]
            foreach slot $::slots {
                assert_no_match "*\"{[slot_tag $slot]}*" $line
            }
            if {[string match "*mark*" $line]} break
        }
        $monitor close
        $events close
        R 2 config set slowlog-log-slower-than 10000
    }

    test "FLUSHALL, SAVE and DEBUG RELOAD of the target in mid-import know its own keys only" {
        fresh
        fill
        R 2 config set save ""
        set before [slots_dump 0 $::slots]
        set id [half_imported]
        set own [seen_at 2]
        R 2 debug reload
        foreach what {dbsize keys digest} {assert_equal [dict get $own $what] [dict get [seen_at 2] $what] $what}
        assert_equal following [job_field 2 $id state]
        R 2 bgsave
        waitForBgsave [Rn 2]
        assert_equal ok [status [Rn 2] rdb_last_bgsave_status]
        R 2 flushall
        assert_equal 0 [R 2 dbsize]
        assert_equal "" [keyspace 2]
        finish $id
        assert_same_dump $before [slots_dump 2 $::slots]
        assert_equal [dict size $before] [R 2 dbsize]
    }

    test "A BGSAVE in mid-import holds none of the keys that are imported" {
        fresh
        fill
        R 2 set [key_in 14000 own] x
        set own [seen_at 2]
        set id [half_imported]
        R 2 save
        kill_node 2
        start_node_again 2
        wait_cluster_agrees
        foreach what {dbsize keys digest} {assert_equal [dict get $own $what] [dict get [seen_at 2] $what] $what}
        failpoint 0 source_before_cut off
    }

    test "The target's expiry and eviction leave imported keys alone, and the source's word counts" {
        fresh
        R 2 debug set-active-expire 1
        fill_strings 2 {14000} 500 1000
        foreach slot $::slots {
            R 0 set [key_in $slot due] x px 300
            R 0 hset [key_in $slot hash] f v g w
            R 0 hpexpire [key_in $slot hash] 300 fields 1 f
        }
        R 0 debug set-active-expire 0
        set id [half_imported]
        R 2 config resetstat
        wait_for_condition 100 10 {[R 0 pttl [key_in 7 due]] == -2} else {fail "no expiry"}
        R 2 set [key_in 14000 own] x px 1
        wait_for_condition 500 10 {[status [Rn 2] expired_keys] == 1} else {fail "the target's own key does not expire"}
        assert_equal 0 [status [Rn 2] expired_subkeys]
        # The counts at the hand-off are equal only if the target kept them all.
        finish $id
        assert_equal 1 [job_field 0 $id attempt]
        wait_for_condition 500 10 {[R 2 dbsize] == 500+3 && [keyspace_field 2 subexpiry] == 0} else {fail "[R 2 info keyspace]"}
    }
}
